"""A time of day that jumps changes nothing: no result, no duration, no verdict of the watchdog."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import traps
from tests.end_to_end.runs import Sabotage, TinyRun
from w1train import report, status
from w1train.training import loop

DAY, HOUR = 86400.0, 3600.0
_MAY_BE_NEGATIVE = {"checkpoint/background_dip"}
"""Steps beside a save may be shorter than the others."""


def clock_that_jumps(jumps: dict[int, float], at_start: float = 0.0) -> Sabotage:
    """The time of day jumps by so many seconds on every rank when a step is recorded."""

    def sabotage(rank: int) -> None:
        offset, real, record_step = at_start, time.time, loop.Trainer.record_step

        def trapped(trainer: loop.Trainer, *args: Any) -> None:
            nonlocal offset
            offset += jumps.get(trainer.progress.step, 0.0)
            record_step(trainer, *args)

        time.time = lambda: real() + offset
        loop.Trainer.record_step = trapped

    return sabotage


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a JSON value with the keys that lead to them."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item, name)
    elif isinstance(value, int | float):
        yield name, value


def negative_numbers(directory: Path) -> list[tuple[str, str, float]]:
    """In all JSON files of a run, and in its report."""
    found = []
    for path in [*directory.rglob("*.json"), *directory.rglob("*.jsonl")]:
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            found += [(path.name, name, value) for name, value in numbers(json.loads(line)) if value < 0 and name not in _MAY_BE_NEGATIVE]
    return found


def event_times(run: TinyRun) -> list[float]:
    return [json.loads(line)["time"] for line in (run.path / "events.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_hour_back_and_a_day_forward_and_a_resume_before_its_own_start(tiny_run, undisturbed, capsys, monkeypatch):
    expected = undisturbed(2, "fp32")
    watched = ("health.hang_timeout=20", "health.heartbeat_interval=0.1")

    def until_the_kill(rank: int) -> None:
        clock_that_jumps({2: -HOUR, 5: DAY})(rank)
        traps.after_record(8)(rank)

    assert tiny_run.train(*watched, world_size=2, sabotage=until_the_kill, log="first").killed
    assert event_times(tiny_run) == sorted(event_times(tiny_run))
    assert not negative_numbers(tiny_run.path)
    outcome = tiny_run.train(*watched, world_size=2, sabotage=clock_that_jumps({8: -HOUR, 10: DAY}, at_start=-HOUR)).require(0)
    assert "s behind the newest event of" in outcome.output
    assert not (tiny_run.path / "stacks").exists()
    assert tiny_run.metrics() == expected.metrics()
    assert tiny_run.samples() == expected.samples()
    assert not negative_numbers(tiny_run.path)
    assert not re.findall(r"(?<![\w.])-\d[\d.]* (?:s|min)\b", outcome.output)
    restarts = [json.loads(line) for line in (tiny_run.path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < record.get("checkpoint/restart_seconds", 1.0) < HOUR for record in restarts)
    capsys.readouterr()
    assert status.main([str(tiny_run.path)]) == 0
    monkeypatch.setattr(sys, "argv", ["w1train.report", str(tiny_run.path)])
    report.main()
    assert not re.findall(r"-\d[\d.]* (?:s|min)\b", capsys.readouterr().out.replace(str(tiny_run.path), ""))
