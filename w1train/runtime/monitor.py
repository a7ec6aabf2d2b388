"""The parts that watch a rank's run: status.json, heartbeats, signals and the watchdog."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from w1train.config.errors import UserError, first_line
from w1train.config.schema import HealthConfig
from w1train.runtime.distributed import Ranks
from w1train.runtime.pulse import SAVING, STARTING, VALIDATING, pulse
from w1train.runtime.status import State, StatusFile
from w1train.runtime.stop_signals import GuestInterrupts, StopSignals
from w1train.runtime.watchdog import Watchdog

_STATES: dict[str, State] = {STARTING: "starting", SAVING: "saving", VALIDATING: "validating"}


@contextmanager
def monitored(directory: Path, ranks: Ranks, settings: HealthConfig, next_start: Callable[[], str]) -> Iterator[StatusFile]:
    """Watch a run from the claim of its directory, which rank 0 holds, to its end. Every rank calls this. If an exception ends the
    block, its text becomes the status's message. After an end without an exception the caller updates the status: the run is finished or
    stopped.

    Args:
        next_start: a function that says where the same command will resume. A thread may call it.
    """
    status = StatusFile(directory, ranks.world_size, active=ranks.is_main)
    # The watchdog's thread looks at once. The time without progress that it measures begins now, and not when the process did.
    pulse.beat()
    with (
        StopSignals() as signals,
        Watchdog(directory, ranks.rank, ranks.world_size, settings, status, signals, next_start),
        _shown(status, next_start),
    ):
        yield status


@contextmanager
def monitored_as_guest(directory: Path, ranks: Ranks, _settings: HealthConfig, next_start: Callable[[], str]) -> Iterator[StatusFile]:
    """Do what :func:`monitored` does, in a process that belongs to somebody else and has no other ranks.

    Nothing ends the process: there is no watchdog, and signals other than Ctrl-C stay the caller's.
    """
    status = StatusFile(directory, ranks.world_size, active=ranks.is_main)
    with GuestInterrupts(), _shown(status, next_start):
        yield status


@contextmanager
def _shown(status: StatusFile, next_start: Callable[[], str]) -> Iterator[None]:
    """Write the progress of the process, and the exception that ends the block, to the status file."""
    pulse.observer = lambda: _show(status)
    pulse.beat()
    try:
        yield
    except KeyboardInterrupt:
        if pulse.can_stop:
            # A second Ctrl-C in a process that belongs to somebody else: steps since the last checkpoint are lost.
            status.update("failed", message=f"ended at once by Ctrl-C at step {pulse.step}; {next_start()}")
        else:
            # Nothing is lost, and nothing has failed.
            status.update("stopped", message=f"Ctrl-C during the start; {next_start()}")
        raise
    except BaseException as error:
        state: State = "mistake" if isinstance(error, UserError) else "failed"
        status.update(state, message=first_line(error))
        raise
    finally:
        pulse.observer = None


def _show(status: StatusFile) -> None:
    status.update(
        _STATES.get(pulse.activity, "running"),
        step=pulse.step,
        num_steps=pulse.num_steps,
        tokens=pulse.tokens,
        total_tokens=pulse.total_tokens,
    )
