"""Signals and hangs, in processes of their own: what ends a process cannot be tried in this one."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from w1train.config.schema import HealthConfig
from w1train.runtime.pulse import TRAINING, Pulse, pulse
from w1train.runtime.status import Heartbeat, StatusFile, read_heartbeats
from w1train.runtime.stop_signals import STOP_SIGNALS, StopSignals
from w1train.runtime.watchdog import Watchdog, describe_hang, describe_place, is_waiting, put_stacks_aside


def end_of(body: Callable[[], None], timeout: float = 60.0) -> int:
    """Exit code of a forked process that runs ``body``."""
    return wait_for(start(body), timeout)


def start(body: Callable[[], None]) -> ForkProcess:
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def wait_for(process: ForkProcess, timeout: float = 60.0) -> int:
    process.join(timeout)
    hung = process.is_alive()
    process.kill()
    process.join()
    assert not hung
    assert process.exitcode is not None
    return process.exitcode


def watched(
    directory: Path, settings: HealthConfig, body: Callable[[StopSignals], None], rank: int = 0, world_size: int = 1
) -> Callable[[], None]:
    def main() -> None:
        sys.stderr = (directory / f"stderr-{rank}").open("w")
        status = StatusFile(directory, world_size, active=rank == 0)
        pulse.activity = TRAINING
        pulse.beat()
        with StopSignals() as signals, Watchdog(directory, rank, world_size, settings, status, signals, lambda: "NEXT"):
            body(signals)

    return main


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_a_second_one_at_once_is_the_same(tmp_path, number):
    """Schedulers send it twice in a tenth of a second."""

    def body(signals: StopSignals) -> None:
        assert pulse.stop_signal == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: signals.requested_at is not None)
        assert pulse.stop_signal == number
        time.sleep(1.5)
        assert not signals.is_urgent
        assert signals.name == number.name

    assert end_of(watched(tmp_path, HealthConfig(), body)) == 0


def test_a_later_second_signal_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr("w1train.runtime.stop_signals._SAME_REQUEST_SECONDS", 0.2)

    def body(signals: StopSignals) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    assert end_of(watched(tmp_path, HealthConfig(), body)) == 1
    assert "a second signal after SIGUSR1" in (tmp_path / "stderr-0").read_text()


def test_the_main_thread_may_sit_where_no_handler_runs(tmp_path):
    """The signal is blocked there, as in C code that does not come back: another thread gets it."""

    def body(signals: StopSignals) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    assert end_of(watched(tmp_path, HealthConfig(stop_timeout=0.5), body)) == 1
    assert "not stopped 0.5 s after SIGTERM" in (tmp_path / "stderr-0").read_text()
    assert "in body" in (tmp_path / "stacks/rank_0.txt").read_text()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_forked_workers_neither_die_of_the_signal_nor_pass_it_on(tmp_path):
    def body(signals: StopSignals) -> None:
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1.0,))
        worker.start()
        for number in STOP_SIGNALS:
            os.kill(worker.pid or 0, number)
        worker.join()
        assert worker.exitcode == 0
        assert signals.requested_at is None

    assert end_of(watched(tmp_path, HealthConfig(), body)) == 0


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_is_noted_and_a_second_one_ends_the_process_in_one_line(tmp_path, monkeypatch, rank):
    """Both may come twice at once, from a terminal and from a launcher. A person has no time limit."""
    monkeypatch.setattr("w1train.runtime.stop_signals._SAME_CTRL_C_SECONDS", 0.3)
    monkeypatch.setattr("w1train.runtime.watchdog.logger", logging.getLogger("answers"))
    logging.getLogger("answers").addHandler(logging.FileHandler(tmp_path / "log"))
    monkeypatch.setattr(logging.getLogger("answers"), "level", logging.INFO)
    # Else the line goes to handlers of earlier tests too, whose streams may be closed.
    monkeypatch.setattr(logging.getLogger("answers"), "propagate", False)

    def body(signals: StopSignals) -> None:
        pulse.can_stop, pulse.step = True, 7
        press_ctrl_c()
        press_ctrl_c()
        wait_until(lambda: signals.requested_at is not None)
        assert pulse.stop_signal == signal.SIGINT
        time.sleep(1.0)
        assert not signals.is_urgent
        (tmp_path / "waited").touch()
        press_ctrl_c()
        time.sleep(60)

    assert end_of(watched(tmp_path, HealthConfig(stop_timeout=0.2), body, rank, 2)) == 130
    assert (tmp_path / "waited").exists()
    expected = "w1train train, rank 0: a second Ctrl-C at step 7: ended at once; NEXT\n"
    assert (tmp_path / f"stderr-{rank}").read_text() == ("" if rank else expected)
    answer = "Ctrl-C: the run saves after the current step, and stops; a second Ctrl-C ends it at once\n"
    assert (tmp_path / "log").read_text() == answer


def test_a_launcher_that_sends_sigterm_after_ctrl_c_has_been_asked_twice(tmp_path, monkeypatch):
    """torchrun does this at a second Ctrl-C."""
    monkeypatch.setattr("w1train.runtime.stop_signals._SAME_CTRL_C_SECONDS", 0.1)

    def body(signals: StopSignals) -> None:
        pulse.can_stop = True
        press_ctrl_c()
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    assert end_of(watched(tmp_path, HealthConfig(), body)) == 130


def test_during_the_start_ctrl_c_ends_the_process_and_another_run_of_it_begins_anew(tmp_path):
    def body(signals: StopSignals) -> None:
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
        assert pulse.stop_signal in (0, signal.SIGINT)
        pulse.can_stop = True
        press_ctrl_c()
        assert pulse.stop_signal == signal.SIGINT

    def twice() -> None:
        for _ in range(2):
            watched(tmp_path, HealthConfig(), body)()

    assert end_of(twice) == 0


def test_ctrl_c_that_was_ignored_stays_ignored(tmp_path):
    """A shell starts a command in the background so: Ctrl-C is meant for the command in the foreground."""

    def main() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        watched(tmp_path, HealthConfig(), body)()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    def body(signals: StopSignals) -> None:
        pulse.can_stop = True
        press_ctrl_c()
        time.sleep(0.3)
        assert (pulse.stop_signal, signals.requested_at) == (0, None)

    assert end_of(main) == 0


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals():
        assert all(signal.getsignal(number) != old for number, old in zip(STOP_SIGNALS, before, strict=True))
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


PATIENCE = HealthConfig(hang_timeout=1.0, heartbeat_interval=0.2)


def test_progress_keeps_a_process_alive_and_heartbeats_tell_of_it(tmp_path):
    def body(signals: StopSignals) -> None:
        for step in range(8):
            time.sleep(0.3)
            pulse.step = step
            pulse.beat()

    assert end_of(watched(tmp_path, PATIENCE, body)) == 0
    assert not (tmp_path / "stacks").exists()
    heartbeat = read_heartbeats(tmp_path, 1)[0]
    assert heartbeat.step >= 6
    assert (heartbeat.activity, heartbeat.rank) == (TRAINING, 0)
    assert "test_watchdog.py" in heartbeat.place


def test_a_start_has_a_patience_of_its_own(tmp_path):
    def body(signals: StopSignals) -> None:
        pulse.activity = "starting"
        time.sleep(2.5)

    assert end_of(watched(tmp_path, PATIENCE, body)) == 0


def test_a_process_that_was_suspended_does_not_hang(tmp_path, monkeypatch):
    monkeypatch.setattr("w1train.runtime.watchdog._PAUSE_SECONDS", 1.0)

    def body(signals: StopSignals) -> None:
        if os.fork() == 0:
            time.sleep(3)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.3)

    assert end_of(watched(tmp_path, PATIENCE, body)) == 0


def test_all_ranks_end_with_their_stacks_when_one_hangs(tmp_path):
    """Rank 1 gets on all the time and sees the mark; rank 0 says why."""

    def hang(signals: StopSignals) -> None:
        time.sleep(60)

    def go_on(signals: StopSignals) -> None:
        for _ in range(600):
            pulse.step = 7
            pulse.beat()
            time.sleep(0.1)

    bodies = {0: hang, 1: go_on}
    processes = [start(watched(tmp_path, PATIENCE, body, rank, 2)) for rank, body in bodies.items()]
    assert [wait_for(process) for process in processes] == [1, 1]
    assert "in hang" in (tmp_path / "stacks/rank_0.txt").read_text()
    assert "in go_on" in (tmp_path / "stacks/rank_1.txt").read_text()
    message = (tmp_path / "stderr-0").read_text()
    assert "at step 0 (health.hang_timeout): rank 0 on " in message
    assert "is behind, the other ranks wait" in message
    assert (tmp_path / "stderr-1").read_text() == ""
    put_stacks_aside(tmp_path)
    put_stacks_aside(tmp_path)
    assert not (tmp_path / "stacks").exists()
    assert (tmp_path / "stacks.previous/rank_1.txt").exists()


WAITING = "torch/distributed/distributed_c10d.py:2900 all_reduce"


def ranks(*steps_and_places: tuple[int, str]) -> dict[int, Heartbeat]:
    return {
        rank: Heartbeat(rank, f"node{rank}", rank, step, TRAINING, 0.0, 0.0, place) for rank, (step, place) in enumerate(steps_and_places)
    }


@pytest.mark.parametrize(
    ("heartbeats", "missing", "expected"),
    [
        (ranks((5, WAITING), (5, WAITING)), [1], "rank 1 on node1 (process 1, step 5, training, in torch/"),
        ({}, [0, 1], "rank 0 (no heartbeat), rank 1 (no heartbeat) of 2 are missing"),
        (ranks((5, WAITING), (4, WAITING)), [], "rank 1 on node1"),
        (ranks((5, "w1train/data/loader.py:1 read"), (5, WAITING), (5, WAITING)), [], "rank 0 on node0"),
        (ranks((5, WAITING), (5, WAITING)), [], "all 2 ranks are equally far; rank 0 is in torch/"),
        (ranks((5, "a.py:1 f"), (5, "a.py:1 f")), [], "all 2 ranks are equally far; rank 0 is in a.py:1 f"),
        ({}, [], "no rank could write a heartbeat"),
    ],
)
def test_who_holds_the_others_up(heartbeats, missing, expected):
    assert describe_hang(heartbeats, missing, max(2, len(heartbeats))).startswith(expected)


def test_places():
    assert describe_place(None) == ""
    assert describe_place(sys._getframe()).endswith(" test_places")
    assert is_waiting(WAITING)
    assert not is_waiting("w1train/training/loop.py:1 fit")


class Handle:
    """A collective that was begun before."""

    def wait(self) -> str:
        return describe_place(sys._getframe(1))


def test_who_waits_for_the_handle_of_a_collective_waits():
    # The frame is the caller's: torch's own handles have no Python function.
    place = Handle().wait()
    assert place.endswith(" test_who_waits_for_the_handle_of_a_collective_waits, waiting")
    assert is_waiting(place)
    heartbeats = ranks((5, place), (5, "w1train/data/loader.py:1 read"))
    assert describe_hang(heartbeats, [], 2).startswith("rank 1 on node1")


def test_an_activity_is_for_a_while():
    calls: list[str] = []
    one = Pulse(activity=TRAINING)
    one.observer = lambda: calls.append(one.activity)
    with one.during("saving"):
        pass
    with contextlib.suppress(FloatingPointError), one.during("saving"):
        raise FloatingPointError("and the run goes back")
    assert calls == ["saving", TRAINING] * 2
