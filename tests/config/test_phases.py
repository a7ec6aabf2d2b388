"""Stages and phases, and the steps and samples at which they begin."""

import pytest

from tests.tiny import VOCAB_SIZE, tiny_config
from w1train.config.phases import phase_ends, phase_start, stage_of_step
from w1train.config.schedule import learning_rate, num_steps, stage_steps
from w1train.config.schema import ScheduleConfig, StageConfig
from w1train.config.stages import at_stage
from w1train.objectives.description import describe_objective

LENGTH = 32


def _config(**stages):
    config = tiny_config()
    config.schedule = ScheduleConfig(
        stages={name: StageConfig(tokens=tokens, learning_rate=1.0, **settings) for name, (tokens, settings) in stages.items()}
    )
    return config


# A step has eight samples of 32 tokens; in the second stage it has sixteen.
STAGES = {
    "first": (4 * 256, {}),
    "wide": (3 * 512, {"global_batch_size": 16}),
    "blocks": (2 * 256 + 1, {"diffusion": {"block_size": 4}}),
    "short": (100, {}),
    "last": (256, {"diffusion": {"block_size": 4}}),
}


def test_a_step_belongs_to_the_stage_it_begins_in():
    config = _config(**STAGES)
    steps = stage_steps(config.schedule, 8, LENGTH)
    # The third step of "blocks" ends after that stage and after "short", which therefore has no step.
    assert steps == {"first": (0, 4), "wide": (32, 3), "blocks": (80, 3), "short": (104, 0), "last": (104, 1)}
    assert num_steps(config.schedule, 8, LENGTH) == 11
    stages = [stage_of_step(config, step) for step in range(12)]
    assert stages == ["first"] * 5 + ["wide"] * 3 + ["blocks"] * 3 + ["last"]


def test_phases_are_stages_of_one_objective():
    config = _config(**STAGES)
    assert phase_ends(config) == [7, 11], "two stages of masked diffusion, two of blocks with a stage without a step between them"
    assert [phase_start(config, step) for step in (1, 7, 8, 11)] == [0, 0, 7, 7]


def test_another_process_is_another_phase():
    """The bounds of two processes are not compared, and neither are those of two schedules or two shares of noise."""
    stages = {
        "masked": {},
        "hybrid": {"objective": "hybrid", "num_noise_ids": VOCAB_SIZE, "t_max": 0.9999},
        "more": {"objective": "hybrid", "num_noise_ids": VOCAB_SIZE, "t_max": 0.9999, "uniform_share": 0.2},
        "cosine": {"noise_schedule": "cosine"},
    }
    config = _config(**{name: (2 * 8 * LENGTH, {"diffusion": fields}) for name, fields in stages.items()})
    assert phase_ends(config) == [2, 4, 6, 8]
    assert [describe_objective(at_stage(config, name)) for name in stages] == [
        "masked diffusion",
        "hybrid diffusion",
        "hybrid diffusion",
        "masked diffusion with the schedule cosine",
    ]
    config.diffusion.block_size = 4
    assert [describe_objective(at_stage(config, name)) for name in ("masked", "hybrid")] == [
        "block diffusion, 4 tokens a block",
        "hybrid diffusion, 4 tokens a block",
    ]
    config.diffusion.block_size = 1
    assert describe_objective(at_stage(config, "masked")) == "block diffusion, 1 token a block"


def test_a_stage_sets_its_own_objective_and_nothing_else():
    config = _config(**STAGES)
    inside = at_stage(config, "blocks")
    assert (inside.diffusion.block_size, config.diffusion.block_size) == (4, None)
    assert inside.model is config.model
    assert at_stage(config, "wide").training.global_batch_size == 16
    assert at_stage(config, "first") is config


def test_rewarming_starts_from_zero_and_is_back_on_the_curve():
    config = _config(first=(1000, {}), decay=(1000, {"style": "linear", "rewarm_tokens": 100}))
    config.schedule.stages["decay"].learning_rate = 0.0
    assert learning_rate(config.schedule, 1000) == 1.0
    assert learning_rate(config.schedule, 1050) == pytest.approx(0.5 * 0.95)
    assert learning_rate(config.schedule, 1100) == pytest.approx(0.9)
    assert learning_rate(config.schedule, 1500) == pytest.approx(0.5)
