"""Train: a recipe in, a trained run directory out.

    python -m w1train.pretrain recipe=demo
    torchrun --nproc-per-node 8 -m w1train.pretrain recipe=w1_4b parallel.tensor=4

The same command again resumes the run. The loop is in w1train/training/loop.py.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

from w1train.config.command_line import PATIENCE_SECONDS, config_from_command_line, wait_for_main_rank
from w1train.config.errors import ConfigurationError, UserError, raise_if_any
from w1train.config.rules.validate import validate
from w1train.config.schema import Config
from w1train.config.serialization import leaves
from w1train.runtime.cluster import discover_ranks
from w1train.runtime.command import command, describe_error
from w1train.runtime.exit_status import ExitStatus
from w1train.runtime.masking import remember_passwords

logger = logging.getLogger(__name__)

# Beginnings of warnings that are no news: of megatron-core about its own defaults and its own shards of the parameters, and of
# torch about the way that megatron-core reads a checkpoint's metadata.
_LIBRARY_CHATTER = (
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process",
    "The argument order of load has been changed",
)


@command("w1train.pretrain")
def main(arguments: list[str]) -> int:
    """Exit status: see w1train.runtime.exit_status. SIGTERM and SIGUSR1 end the run after the step that is under way, with a checkpoint;
    before it holds its run directory, at once."""
    try:
        # Before anything asks for RANK: the command line does, to say its mistakes once.
        discovery = discover_ranks()
    except ConfigurationError as error:
        return _fail_alone(str(error), ExitStatus.MISTAKE)
    config = config_from_command_line(arguments, program="w1train.pretrain", description="Pretrain a diffusion language model.")
    remember_passwords(str(value) for _, value in leaves(config))  # a recipe or a variable of the environment may have brought them
    set_up_logging()
    if discovery is not None:
        logger.info("%s", discovery)
    try:
        raise_if_any(validate(config, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
    except ConfigurationError as error:
        return _fail_together(str(error), ExitStatus.MISTAKE)
    try:
        return run(config)
    except KeyboardInterrupt:
        # Ctrl-C goes to torchrun too, and whoever typed it waits.
        return _fail_together("interrupted; the same command goes on from the last checkpoint", ExitStatus.INTERRUPTED, seconds=1.0)


def run(config: Config) -> int:
    """Build and train. megatron-core is imported only here: seconds, which a mistake in the configuration need not wait for."""
    gc.disable()  # imports leave no garbage, and looking for it takes an eighth of a start
    from w1train.runtime.device import make_deterministic
    from w1train.runtime.distributed import distributed, is_lost_connection, on_main_rank
    from w1train.runtime.megatron_on_cpu import import_megatron
    from w1train.runtime.monitor import monitored
    from w1train.runtime.run_directory import RunDirectory
    from w1train.runtime.watchdog import put_stacks_aside

    import_megatron()
    from w1train.checkpoints.manifest import CheckpointError
    from w1train.conversion.initial_weights import open_initial_weights
    from w1train.training.loop import Trainer

    gc.enable()
    if config.training.deterministic:
        make_deterministic()
    directory = RunDirectory(Path(config.runs_dir) / config.name)
    # The watchdog ends a run that hangs, and says who holds it up; a collective's own timeout would only say that it waits.
    timeout = timedelta(seconds=2 * max(config.health.hang_timeout, config.health.start_timeout))
    # Around the process groups, not inside: they are torn down at a clean end only.
    try:
        with distributed(config.parallel, timeout) as ranks:
            on_main_rank(directory.claim)
            on_main_rank(partial(put_stacks_aside, directory.path))
            with monitored(directory.path, ranks, config.health) as status:
                trainer = Trainer(config, ranks, directory, open_initial_weights)
                trainer.fit()
                status.update("stopped" if trainer.stopped else "finished")
    except UserError as error:
        return _fail(error, ExitStatus.MISTAKE)
    except (CheckpointError, FloatingPointError, OSError) as error:
        return _fail(error, ExitStatus.FAILED)
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        return _fail_alone("lost the connection to another rank, which says why if it could", ExitStatus.FAILED)
    finally:
        directory.release()
    return ExitStatus.STOPPED if trainer.stopped else ExitStatus.FINISHED


def set_up_logging() -> None:
    """Rank 0 tells the story; the others only what goes wrong."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # At INFO it prints its whole configuration and the name of every parameter.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    for message in _LIBRARY_CHATTER:
        warnings.filterwarnings("ignore", message=re.escape(message))
    # What the libraries deprecate in each other.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron)\.")


def _fail(error: Exception, status: int) -> int:
    """Said by rank 0 for all, or by the rank that alone knows it."""
    from w1train.runtime.distributed import is_agreed

    message = "\n".join([describe_error(error), *getattr(error, "__notes__", [])])
    return _fail_together(message, status) if is_agreed(error) else _fail_alone(message, status)


def _fail_together(message: str, status: int, seconds: float = PATIENCE_SECONDS) -> int:
    """For what ends all ranks alike. The others give rank 0 some seconds to say it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"w1train.pretrain: {message}", file=sys.stderr, flush=True)
    wait_for_main_rank(seconds)
    return status


def _fail_alone(message: str, status: int) -> int:
    """For what no other rank need know."""
    rank = f", rank {os.environ['RANK']}" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"w1train.pretrain{rank}: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
