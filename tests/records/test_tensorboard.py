"""TensorBoard's files, read back with its own reader."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

from tests.records.recorded_run import STAGES, TIMESTEPS, recorded_run
from tests.reports.fake_run import sample_record, train_record, validation_record
from w1train.config.errors import UserError
from w1train.records import tensorboard
from w1train.records.chart_metrics import chart_metrics
from w1train.records.tensorboard import TensorBoardSink

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")


def start(run_dir: Path, step: int) -> TensorBoardSink:
    """Open the sink of a start that goes on from the checkpoint of ``step``."""
    sink = TensorBoardSink(recorded_run(run_dir, step=step, tensorboard=True))
    sink.start()
    return sink


def read_scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """Return {metric: {step: value}}, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@needs_tensorboard
def test_every_metric_at_its_step(tmp_path):
    sink = start(tmp_path, 0)
    records = [validation_record(0, num_timesteps=2), *(train_record(step) | {"stage": "two"} for step in (1, 2))]
    for record in records:
        sink.record(record)
    sink.record_samples([sample_record(2), sample_record(3)])
    sink.close(failed=False)
    scalars = read_scalars(tmp_path)
    for record in records:
        for name, value in chart_metrics(record, TIMESTEPS, STAGES).items():
            assert scalars[name][record["step"]] == pytest.approx(value), name
    assert scalars["phase"] == {1: 2.0, 2: 2.0}


@needs_tensorboard
@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "rewound"])
def test_steps_that_are_done_again_are_shown_once(tmp_path, is_killed):
    """The run goes back to the checkpoint of step 3 after step 5."""
    second = first = start(tmp_path, 0)
    for step in range(1, 6):
        first.record(train_record(step))
    if is_killed:
        first.close(failed=False)
        second = start(tmp_path, 3)
    else:
        first.go_back(3)
    for step in range(4, 7):
        second.record(train_record(step, seed=1))
    second.close(failed=False)
    shown = read_scalars(tmp_path)["loss"]
    assert shown == pytest.approx({step: train_record(step, seed=int(step > 3))["loss"] for step in range(1, 7)})


@needs_tensorboard
def test_steps_that_are_done_again_are_shown_once_after_a_clock_was_set_back(tmp_path, monkeypatch):
    now = time.time()
    for done, last_step, seed, offset in [(0, 3, 0, 0), (1, 4, 1, -3600), (3, 5, 2, -7200)]:
        monkeypatch.setattr(time, "time", lambda offset=offset: now + offset)
        sink = start(tmp_path, done)
        for step in range(done + 1, last_step + 1):
            sink.record(train_record(step, seed=seed))
        sink.close(failed=False)
    seeds = {1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
    assert read_scalars(tmp_path)["loss"] == pytest.approx({step: train_record(step, seed=seeds[step])["loss"] for step in seeds})


def test_it_is_missed_before_the_run_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="'w1train\\[tensorboard\\]', or set it to false"):
        TensorBoardSink(recorded_run(tmp_path))
