"""Ctrl-C during a run in a process that belongs to somebody else."""

from __future__ import annotations

import signal
import threading
from types import SimpleNamespace

import pytest

from w1train.config.schema import HealthConfig
from w1train.runtime.monitor import monitored_as_guest
from w1train.runtime.pulse import TRAINING, pulse
from w1train.runtime.status import read_status
from w1train.runtime.stop_signals import GuestInterrupts


@pytest.fixture(autouse=True)
def _fresh_pulse():
    pulse.reset()
    yield
    pulse.reset()


def test_the_first_ctrl_c_asks_and_the_second_ends():
    before = signal.getsignal(signal.SIGINT)
    with GuestInterrupts():
        pulse.can_stop = True
        signal.raise_signal(signal.SIGINT)
        assert pulse.stop_signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_during_the_start_ends_at_once():
    with GuestInterrupts(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert pulse.stop_signal == 0


@pytest.mark.parametrize(
    ("can_stop", "state", "message"),
    [(False, "stopped", "Ctrl-C during the start; NEXT"), (True, "failed", "ended at once by Ctrl-C at step 7; NEXT")],
)
def test_the_status_says_what_was_ended_at_once(tmp_path, can_stop, state, message):
    """The start, of which nothing is lost, or a step after a first Ctrl-C."""
    ranks = SimpleNamespace(world_size=1, is_main=True)

    def interrupted() -> None:
        with monitored_as_guest(tmp_path, ranks, HealthConfig(), lambda: "NEXT"):
            pulse.can_stop, pulse.step, pulse.stop_signal = can_stop, 7, signal.SIGINT
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    status = read_status(tmp_path)
    assert (status.state, status.message) == (state, message)


def test_signals_of_schedulers_stay_the_callers():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with GuestInterrupts():
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_another_thread_may_train():
    handlers = []

    def work() -> None:
        with GuestInterrupts():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert handlers == [signal.getsignal(signal.SIGINT)]


def test_an_earlier_run_is_forgotten():
    pulse.step, pulse.stop_signal, pulse.activity = 7, signal.SIGINT, TRAINING
    pulse.transfers.append("x")
    pulse.reset()
    assert (pulse.step, pulse.stop_signal, pulse.activity, pulse.transfers) == (0, 0, "starting", [])
