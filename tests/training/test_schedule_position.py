"""The place of a run in its schedule, step by step, against numbers counted by hand."""

from __future__ import annotations

import pytest

from tests.tiny import LENGTH, tiny_config
from w1train.config.schema import StageConfig
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.checkpoints.manifest import Progress  # noqa: E402
from w1train.training.schedule_position import SchedulePosition  # noqa: E402

SMALL, LARGE = 8, 16
"""Samples of a step, before and after the batch grows."""
STAGES = {
    "warmup": StageConfig(tokens=2 * SMALL * LENGTH, learning_rate=1.0, style="linear"),
    "stable": StageConfig(tokens=4 * LARGE * LENGTH, learning_rate=1.0, global_batch_size=LARGE),
    "blocks": StageConfig(
        tokens=2 * SMALL * LENGTH, learning_rate=0.5, diffusion={"block_size": 4, "annealing_tokens": 4 * SMALL * LENGTH}
    ),
}
# Stage, learning rate and annealing while each step is computed; the end of a phase after it.
STEPS = [
    ("warmup", 0.5, 1.0, False),
    ("warmup", 1.0, 1.0, False),
    *[("stable", 1.0, 1.0, False)] * 3,
    ("stable", 1.0, 1.0, True),
    ("blocks", 0.5, 1 / (4 * SMALL * LENGTH), False),
    ("blocks", 0.5, (SMALL * LENGTH + 1) / (4 * SMALL * LENGTH), True),
]


@pytest.fixture
def walk() -> tuple[Progress, SchedulePosition]:
    """The position at the beginning, and the progress that moves it."""
    progress = Progress()
    return progress, SchedulePosition(tiny_config(schedule={"stages": STAGES}), progress)


def test_each_step_has_its_stage(walk):
    progress, position = walk
    assert (position.num_steps, position.num_tokens) == (len(STEPS), sum(stage.tokens for stage in STAGES.values()))
    for name, rate, annealed, ends_phase in STEPS:
        assert not position.is_over
        position.enter_stage()
        assert (position.stage_name, position.learning_rate, position.annealed) == (name, pytest.approx(rate), pytest.approx(annealed))
        progress.step += 1
        progress.samples += position.stage.training.global_batch_size
        assert position.is_phase_end is ends_phase
    assert position.is_over
    assert position.names() == {"stage": "blocks", "block_size": 4}


def test_what_is_due_every_three_steps(walk):
    progress, position = walk
    due, starts = [], []
    for progress.step in range(1, len(STEPS) + 1):
        due += [progress.step] if position.is_due(3) else []
        starts.append(position.phase_start)
        assert not position.is_due(0)
    assert due == [3, 6, 8]
    assert starts == [0] * 6 + [6] * 2


def test_a_resumed_run_is_in_the_stage_of_its_last_step():
    config = tiny_config(schedule={"stages": STAGES})
    names = [SchedulePosition(config, Progress(step=step)).stage_name for step in range(len(STEPS) + 1)]
    assert names == ["warmup", *(name for name, *_ in STEPS)]
