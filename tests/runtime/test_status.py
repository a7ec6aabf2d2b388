"""status.json and heartbeats, and the command that reads them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from w1train import status as command
from w1train.runtime.exit_status import ExitStatus
from w1train.runtime.status import Heartbeat, StatusFile, heartbeat_path, read_heartbeats, read_status, write_heartbeat

CONTRACT = {"state", "step", "num_steps", "tokens", "total_tokens", "time", "pid", "host", "world_size", "message"}


def written(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "status.json").read_text())


def heartbeat(rank: int, step: int = 10, silent: float = 0.0) -> Heartbeat:
    return Heartbeat(rank, f"node{rank}", 100 + rank, step, "training", time.time(), time.time() - silent, "file.py:1 function")


def test_a_change_of_state_is_written_at_once_and_steps_once_a_second(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    status = StatusFile(tmp_path, world_size=2, active=True)
    status.update("starting", num_steps=10)
    assert written(tmp_path).keys() == CONTRACT
    assert written(tmp_path)["pid"] == os.getpid()
    status.update("running", step=1)
    assert (written(tmp_path)["state"], written(tmp_path)["step"]) == ("running", 1)
    now += 0.5
    status.update("running", step=2)
    assert written(tmp_path)["step"] == 1
    now += 0.6
    status.update("running", step=3)
    assert written(tmp_path)["step"] == 3
    status.update("saving")
    status.update("failed", message="no space")
    assert (written(tmp_path)["state"], written(tmp_path)["message"], written(tmp_path)["num_steps"]) == ("failed", "no space", 10)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_other_ranks_write_nothing(tmp_path):
    status = StatusFile(tmp_path, world_size=2, active=False)
    status.update("running", step=1)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_stays_finished_until_it_trains_on(tmp_path):
    StatusFile(tmp_path, world_size=1, active=True).update("finished", step=10)
    before = (tmp_path / "status.json").read_bytes()
    again = StatusFile(tmp_path, world_size=1, active=True)
    for state in ("starting", "finished", "paused", "stopped", "failed"):
        again.update(state)
        assert again.is_held
        assert (tmp_path / "status.json").read_bytes() == before
    again.update("running", step=11)
    assert not again.is_held
    assert written(tmp_path)["step"] == 11


def test_what_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    StatusFile(tmp_path / "file", world_size=1, active=True).update("running")
    assert "could not write" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", "{", '{"state": "running"}', '{"unknown": 1}'])
def test_a_status_that_is_none(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None
    assert command.main([str(tmp_path)]) == ExitStatus.MISTAKE


def test_heartbeats_are_read_back_but_for_what_is_torn(tmp_path):
    for rank in (0, 2):
        write_heartbeat(tmp_path, heartbeat(rank))
    assert heartbeat_path(tmp_path, 2) == tmp_path / "heartbeats/rank_00002.json"
    heartbeat_path(tmp_path, 1).write_text("{")
    found = read_heartbeats(tmp_path, 4)
    assert {rank: found[rank].host for rank in found} == {0: "node0", 2: "node2"}


@pytest.mark.parametrize(
    ("changes", "expected", "words"),
    [
        ({"state": "finished"}, 0, "finished, step 5/20 (25.0%), 1,000 of 4,000 tokens, 4 ranks"),
        ({"state": "stopped"}, 75, "stopped"),
        ({"state": "paused", "message": "ended at step 5"}, 4, "paused, step 5/20 (25.0%), "),
        ({"state": "failed", "message": "no space left"}, 1, "no space left"),
        ({"state": "mistake", "message": "no such corpus"}, 2, "no such corpus"),
        ({"state": "running"}, 3, "running"),
        ({"state": "saving"}, 3, "saving"),
        ({"state": "running", "time": 0.0}, 1, "died"),
        ({"state": "running", "pid": 2**22 + 1}, 1, "died"),
        ({"state": "running", "pid": 2**22 + 1, "host": "elsewhere"}, 3, "running"),
        ({"state": "finished", "pid": 2**22 + 1, "time": 0.0}, 0, "finished"),
    ],
)
def test_the_command(tmp_path, capsys, changes, expected, words):
    values = {"state": "running", "step": 5, "num_steps": 20, "tokens": 1000, "total_tokens": 4000, "time": time.time(), "pid": os.getpid()}
    values |= {"host": socket.gethostname(), "world_size": 4, "message": None, **changes}
    (tmp_path / "status.json").write_text(json.dumps(values))
    assert command.main([str(tmp_path)]) == expected
    assert words in capsys.readouterr().out


def test_a_long_start_that_beats_is_none_that_died(tmp_path, monkeypatch):
    """health.start_timeout is longer than what a reader bears from a run of which nothing is heard."""
    started = time.time() - 3000
    monkeypatch.setattr(time, "time", lambda: started)
    StatusFile(tmp_path, world_size=2, active=True).update("starting")
    monkeypatch.undo()
    write_heartbeat(tmp_path, heartbeat(1))
    assert command.main([str(tmp_path)]) == ExitStatus.RUNNING
    for dead in (started, time.time() + 3000):
        write_heartbeat(tmp_path, replace(heartbeat(1), time=dead))
        assert command.main([str(tmp_path)]) == ExitStatus.FAILED, "long ago, or by a clock that is wrong"


def test_of_several_runs_the_worst_counts(tmp_path, capsys):
    for name, state in (("a", "finished"), ("b", "paused"), ("c", "stopped"), ("d", "running"), ("e", "failed")):
        (tmp_path / name).mkdir()
        StatusFile(tmp_path / name, world_size=1, active=True).update(state)
    runs = [str(tmp_path / name) for name in "abcde"]
    assert [command.main(runs[: number + 1]) for number in range(5)] == [0, 4, 75, 3, 1]
    assert command.main([*runs, str(tmp_path / "none")]) == 2
    assert capsys.readouterr().out.splitlines()[-1].endswith("none: no status.json: not a run directory, or never started")


def test_slow_ranks_are_named(tmp_path, capsys, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)  # on a busy machine, seconds may pass until the command reads it
    StatusFile(tmp_path, world_size=4, active=True).update("running", step=10)
    for rank, (step, silent) in enumerate([(10, 0.0), (10, 100.0), (8, 0.0), (9, 1.0)]):
        write_heartbeat(tmp_path, heartbeat(rank, step, silent))
    command.main([str(tmp_path)])
    line = capsys.readouterr().out
    assert "slow: rank 1 on node1 (step 10, training, 100 s), rank 2 on node2 (step 8" in line
    assert "rank 0" not in line
    assert "rank 3" not in line


def test_a_clock_that_jumps_makes_no_negative_times(tmp_path, capsys, monkeypatch):
    StatusFile(tmp_path, world_size=3, active=True).update("running", step=10)
    for rank, silent in enumerate((0.0, 100.0, 0.0)):
        write_heartbeat(tmp_path, heartbeat(rank, 8 if rank == 2 else 10, silent))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    assert command.main([str(tmp_path)]) == ExitStatus.RUNNING
    line = capsys.readouterr().out
    assert "last progress 0 s ago (written by a clock that is 60 min ahead of this machine's)" in line
    assert "rank 1 on node1 (step 10, training, 100 s)" in line
    assert "rank 2 on node2 (step 8, training, 0 s)" in line
    assert "-" not in line.partition(": ")[2]


def test_the_command_needs_no_torch(tmp_path):
    """Scripts ask it every few seconds."""
    StatusFile(tmp_path, world_size=1, active=True).update("stopped")
    code = (
        f"import sys; from w1train import status; code = status.main([{str(tmp_path)!r}]); sys.exit(2 if 'torch' in sys.modules else code)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, stdout=subprocess.DEVNULL).returncode == 75
