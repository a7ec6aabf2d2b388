"""What TensorBoard gets, read back with its own reader."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

from tests.reports.fake_run import sample_record, train_record, validation_record
from w1train.config.errors import UserError
from w1train.records import tensorboard
from w1train.records.tensorboard import TensorBoardLogger, require_tensorboard
from w1train.records.wandb_log import wandb_metrics

TIMESTEPS = [0.25, 0.75]
needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")


def start(run_dir: Path, first_step: int) -> TensorBoardLogger:
    return TensorBoardLogger(run_dir, first_step=first_step, validation_timesteps=TIMESTEPS, stages=("one", "two"))


def read_scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """{metric: {step: value}}, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@needs_tensorboard
def test_every_metric_at_its_step(tmp_path):
    logger = start(tmp_path, 0)
    records = [validation_record(0, num_timesteps=2), *(train_record(step) | {"stage": "two"} for step in (1, 2))]
    for record in records:
        logger.log(record)
    logger.log_samples([sample_record(2), sample_record(3)])
    logger.close()
    scalars = read_scalars(tmp_path)
    for record in records:
        for name, value in wandb_metrics(record, TIMESTEPS, ("one", "two")).items():
            assert scalars[name][record["step"]] == pytest.approx(value), name
    assert scalars["phase"] == {1: 2.0, 2: 2.0}


@needs_tensorboard
@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "rewound"])
def test_steps_that_are_done_again_are_shown_once(tmp_path, is_killed):
    """After step 5, from the checkpoint of step 3."""
    second = first = start(tmp_path, 0)
    for step in range(1, 6):
        first.log(train_record(step))
    if is_killed:
        first.close()
        second = start(tmp_path, 4)
    else:
        first.go_back(4)
    for step in range(4, 7):
        second.log(train_record(step, seed=1))
    second.close()
    shown = read_scalars(tmp_path)["loss"]
    assert shown == pytest.approx({step: train_record(step, seed=int(step > 3))["loss"] for step in range(1, 7)})


@needs_tensorboard
def test_steps_that_are_done_again_are_shown_once_after_a_clock_was_set_back(tmp_path, monkeypatch):
    now = time.time()
    for first_step, last_step, seed, offset in [(0, 3, 0, 0), (2, 4, 1, -3600), (4, 5, 2, -7200)]:
        monkeypatch.setattr(time, "time", lambda offset=offset: now + offset)
        logger = start(tmp_path, first_step)
        for step in range(max(1, first_step), last_step + 1):
            logger.log(train_record(step, seed=seed))
        logger.close()
    seeds = {1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
    assert read_scalars(tmp_path)["loss"] == pytest.approx({step: train_record(step, seed=seeds[step])["loss"] for step in seeds})


def test_it_is_missed_before_the_run_begins(monkeypatch):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="'w1train\\[tensorboard\\]', or set it to false"):
        require_tensorboard()
