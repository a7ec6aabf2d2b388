"""The command that trains a model in one rank: it reads a recipe and writes a run directory.

    torchrun --nproc-per-node 8 -m w1train.pretrain recipe=w1_4b parallel.tensor=4

torchrun and srun start it for each rank. `w1train train` (w1train/launcher.py) starts the ranks of one machine by itself. The same command,
given again, resumes the run. The training loop is in w1train/training/loop.py.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

from w1train.runtime.ctrl_c import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c("w1train train")

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from w1train.checkpoints.manifest import CheckpointError, describe_next_start
from w1train.config.command_line import PATIENCE_SECONDS, config_from_command_line, wait_for_main_rank
from w1train.config.errors import ConfigurationError, UserError, raise_if_any
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config, HealthConfig
from w1train.config.serialization import leaves
from w1train.registered_names import NAME_RULES
from w1train.runtime.announcement import announce
from w1train.runtime.cluster import discover_ranks
from w1train.runtime.command import command, describe_error
from w1train.runtime.exit_status import ExitStatus, status_after
from w1train.runtime.logs import logged_to, set_up_logging
from w1train.runtime.masking import remember_passwords

if TYPE_CHECKING:  # these modules import torch
    from w1train.runtime.distributed import Ranks
    from w1train.runtime.status import StatusFile

logger = logging.getLogger(__name__)

PROGRAM = "w1train train"
DESCRIPTION = "Pretrain a diffusion language model."
COUNTS = {
    "--max-steps": "for trials: save and end at step N of the run; without it, the same command continues, with the same schedule",
}
"""The flags that this command has beside those of the configuration, and their meanings."""


@command(PROGRAM)
def main(arguments: list[str]) -> int:
    """Run the command. Return an ExitStatus (w1train.runtime.exit_status).

    SIGTERM, SIGUSR1 and Ctrl-C end the run after the current step, with a checkpoint. During the start Ctrl-C ends the run at once, and
    the signals do the same before the run holds its directory.
    """
    try:
        # This sets RANK, which the command line reads in order to report mistakes once.
        discovery = discover_ranks()
    except ConfigurationError as error:
        return fail_alone(str(error), ExitStatus.MISTAKE)
    announce(arguments)
    config, counts = config_from_command_line(arguments, PROGRAM, DESCRIPTION, NAME_RULES, COUNTS, rank_rules)
    return train(config, counts.get("--max-steps"), discovery)


def rank_rules(counts: Mapping[str, int]) -> tuple[Rule, ...]:
    """Return what this rank checks before the ranks have met. ``counts`` are the values of the command's own flags."""
    from w1train.preflight.start_rules import run_rules  # it imports NumPy, for which the first line of the run should not wait

    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    is_first_to_check = _refuses_early() and os.environ.get("RANK", "0") == "0"
    return run_rules(num_ranks, num_ranks if is_first_to_check else None, counts.get("--max-steps"))


def train(config: Config, max_steps: int | None = None, discovery: str | None = None) -> int:
    """Train a run that has been checked, in this process, which is one rank. Return an ExitStatus.

    Args:
        max_steps: the step of the run at which this start ends; None = the last step of the schedule.
        discovery: where the rank of this process was found, for the log.
    """
    remember_passwords(str(value) for _, value in leaves(config))  # a recipe or a variable of the environment may have brought them
    set_up_logging()
    if discovery is not None:
        logger.info("%s", discovery)
    try:
        return run(config, max_steps)
    except KeyboardInterrupt:
        # The user waits, and torchrun gets Ctrl-C too, so that the other ranks wait for a second only.
        message = f"ended by Ctrl-C; {describe_next_start(Path(config.runs_dir) / config.name / 'checkpoints')}"
        return _fail_together(message, ExitStatus.INTERRUPTED, seconds=1.0)


def run(config: Config, max_steps: int | None = None) -> int:
    """Build the model and train it, to the step ``max_steps`` at most. Return an ExitStatus."""
    # megatron-core takes seconds to import, which a mistake in the configuration should not wait for.
    gc.disable()  # imports leave no garbage, and the search for it takes an eighth of the time of a start
    from w1train.runtime.device import make_deterministic
    from w1train.runtime.distributed import distributed, is_lost_connection
    from w1train.runtime.megatron_on_cpu import import_megatron
    from w1train.runtime.run_directory import RunDirectory, RunDirectoryInUseError

    import_megatron()
    from w1train.training.run_description import print_end
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
            trainer = train_run(config, ranks, directory, max_steps, monitor=partial(_monitored, config, max_steps))
            if ranks.is_main:
                stop_signal, is_stopped = trainer.stop_signal, trainer.stopped
                print_end(config, directory, trainer.progress, trainer.position, stop_signal=stop_signal, is_stopped=is_stopped)
    except RunDirectoryInUseError as error:
        return _fail(error, ExitStatus.FAILED)
    except UserError as error:
        return _fail(error, ExitStatus.MISTAKE)
    except (CheckpointError, FloatingPointError, OSError) as error:
        return _fail(error, ExitStatus.FAILED)
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        return fail_alone("lost the connection to another rank, whose own message, if it could write one, says why", ExitStatus.FAILED)
    finally:
        directory.release()
    return status_after(trainer.stop_signal)


@contextmanager
def _monitored(
    config: Config, max_steps: int | None, directory: Path, ranks: Ranks, health: HealthConfig, next_start: Callable[[], str]
) -> Iterator[StatusFile]:
    """Watch the run, and write its log. Rank 0 checks its machine here if it could not end the run earlier."""
    from w1train.preflight.start_rules import machine_problems
    from w1train.runtime.distributed import on_main_rank
    from w1train.runtime.monitor import monitored
    from w1train.runtime.run_directory import RunDirectory

    with (
        monitored(directory, ranks, health, next_start) as status,
        logged_to(RunDirectory(directory).log, status, active=ranks.is_main),
    ):
        if not _refuses_early():
            on_main_rank(lambda: raise_if_any(machine_problems(config, max_steps)))
        yield status


def _refuses_early() -> bool:
    """Tell whether rank 0 may end the run before the ranks have met: there are no other ranks, or torchrun ends them. Ranks on other
    machines, and those that srun starts, would wait for rank 0, so that they must meet before the check."""
    num_ranks = os.environ.get("WORLD_SIZE", "1")
    return num_ranks == "1" or ("TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") == num_ranks)


def _fail(error: Exception, status: int) -> int:
    """Report an error once, and return the status. Rank 0 reports it if all ranks met it, and otherwise this rank reports it."""
    from w1train.runtime.distributed import is_agreed

    message = "\n".join([describe_error(error), *getattr(error, "__notes__", [])])
    return _fail_together(message, status) if is_agreed(error) else fail_alone(message, status)


def _fail_together(message: str, status: int, seconds: float = PATIENCE_SECONDS) -> int:
    """Report an error that ends all ranks, on rank 0, and return the status. The other ranks give rank 0 some seconds for it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)
    wait_for_main_rank(seconds)
    return status


def fail_alone(message: str, status: int) -> int:
    """Report an error that this rank alone has met, and return the status."""
    rank = f", rank {os.environ['RANK']}" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"{PROGRAM}{rank}: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
