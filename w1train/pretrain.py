"""The command that trains a model: it reads a recipe and writes a run directory.

    python -m w1train.pretrain recipe=demo
    torchrun --nproc-per-node 8 -m w1train.pretrain recipe=w1_4b parallel.tensor=4

The same command, given again, resumes the run. The training loop is in w1train/training/loop.py.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import gc
import logging
import re
import warnings
from datetime import timedelta
from pathlib import Path

from w1train.config.command_line import PATIENCE_SECONDS, config_from_command_line, wait_for_main_rank
from w1train.config.errors import ConfigurationError, UserError, raise_if_any
from w1train.config.rules.validate import validate
from w1train.config.schema import Config
from w1train.config.serialization import leaves
from w1train.registered_names import NAME_RULES
from w1train.runtime.cluster import discover_ranks
from w1train.runtime.command import command, describe_error
from w1train.runtime.exit_status import ExitStatus
from w1train.runtime.masking import remember_passwords

logger = logging.getLogger(__name__)

# Beginnings of warnings that tell users nothing: those of megatron-core about its own defaults and its own shards of the parameters, and
# those of torch about the way in which megatron-core reads a checkpoint's metadata.
_LIBRARY_CHATTER = (
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process",
    "The argument order of load has been changed",
)


@command("w1train.pretrain")
def main(arguments: list[str]) -> int:
    """Run the command. Return an ExitStatus (w1train.runtime.exit_status).

    SIGTERM and SIGUSR1 end the run after the current step, with a checkpoint. Before the run holds its directory, they end it at once.
    """
    try:
        # This sets RANK, which the command line reads in order to report mistakes once.
        discovery = discover_ranks()
    except ConfigurationError as error:
        return _fail_alone(str(error), ExitStatus.MISTAKE)
    config = config_from_command_line(
        arguments, program="w1train.pretrain", description="Pretrain a diffusion language model.", rules=NAME_RULES
    )
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
        # The user waits, and torchrun gets Ctrl-C too, so that the other ranks wait for a second only.
        return _fail_together("interrupted; the same command resumes from the last checkpoint", ExitStatus.INTERRUPTED, seconds=1.0)


def run(config: Config) -> int:
    """Build the model and train it. Return an ExitStatus."""
    # megatron-core takes seconds to import, which a mistake in the configuration should not wait for.
    gc.disable()  # imports leave no garbage, and the search for it takes an eighth of the time of a start
    from w1train.runtime.device import make_deterministic
    from w1train.runtime.distributed import distributed, is_lost_connection
    from w1train.runtime.megatron_on_cpu import import_megatron
    from w1train.runtime.run_directory import RunDirectory

    import_megatron()
    from w1train.checkpoints.manifest import CheckpointError
    from w1train.training.whole_run import train_run

    gc.enable()
    if config.training.deterministic:
        make_deterministic()
    directory = RunDirectory(Path(config.runs_dir) / config.name)
    # The watchdog ends a run that hangs, and names the rank that it waits for. A collective's timeout would only say that it waits.
    timeout = timedelta(seconds=2 * max(config.health.hang_timeout, config.health.start_timeout))
    # Errors are handled outside of the process groups, which are torn down only at a clean end.
    try:
        with distributed(config.parallel, timeout) as ranks:
            trainer = train_run(config, ranks, directory)
    except UserError as error:
        return _fail(error, ExitStatus.MISTAKE)
    except (CheckpointError, FloatingPointError, OSError) as error:
        return _fail(error, ExitStatus.FAILED)
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        return _fail_alone("lost the connection to another rank, whose own message, if it could write one, says why", ExitStatus.FAILED)
    finally:
        directory.release()
    return ExitStatus.STOPPED if trainer.stopped else ExitStatus.FINISHED


def set_up_logging() -> None:
    """Set up logging: rank 0 logs at INFO, the other ranks only warnings and errors."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # At INFO, megatron-core logs its whole configuration and the name of every parameter.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    for message in _LIBRARY_CHATTER:
        warnings.filterwarnings("ignore", message=re.escape(message))
    # Deprecations of one library in another.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron)\.")


def _fail(error: Exception, status: int) -> int:
    """Report an error once, and return the status. Rank 0 reports it if all ranks met it, and otherwise this rank reports it."""
    from w1train.runtime.distributed import is_agreed

    message = "\n".join([describe_error(error), *getattr(error, "__notes__", [])])
    return _fail_together(message, status) if is_agreed(error) else _fail_alone(message, status)


def _fail_together(message: str, status: int, seconds: float = PATIENCE_SECONDS) -> int:
    """Report an error that ends all ranks, on rank 0, and return the status. The other ranks give rank 0 some seconds for it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"w1train.pretrain: {message}", file=sys.stderr, flush=True)
    wait_for_main_rank(seconds)
    return status


def _fail_alone(message: str, status: int) -> int:
    """Report an error that this rank alone has met, and return the status."""
    rank = f", rank {os.environ['RANK']}" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"w1train.pretrain{rank}: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
