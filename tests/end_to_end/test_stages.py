"""A run whose stages have objectives and texts of their own: what it records, and that a kill in or between phases changes nothing."""

from __future__ import annotations

import shutil

import pytest

from tests.end_to_end import traps
from tests.end_to_end.runs import BATCH, LENGTH, VOCAB_SIZE, TinyRun
from tests.end_to_end.test_resume import require_equal
from w1train.checkpoints.manifest import read_scores

STEP = BATCH * LENGTH
# (name, steps, what it sets); 13 steps, of which the phases' ends are 3, 6, 8 and 13.
ANNEALED = f"attention_annealing: extent, annealing_tokens: {STEP}"
HYBRID = f"objective: hybrid, num_noise_ids: {VOCAB_SIZE}, t_max: 0.9999, loss: kl_is"
STAGES = [
    ("ar", 3, "diffusion: {objective: autoregressive}"),
    (
        "pairs",
        3,
        "diffusion: {block_size: 4, timestep_per: block, complementary: true, shift: true, mask_embedding_noise: 0.1}, train: OTHER",
    ),
    ("whole", 2, f"rewarm_tokens: {STEP}, diffusion: {{block_size: {LENGTH}, {ANNEALED}, {HYBRID}}}"),
    ("eight", 3, "diffusion: {block_size: 8, clean_attention: token_causal, autoregressive_weight: 0.5}"),
    ("last", 2, "style: linear, diffusion: {block_size: 8, clean_attention: token_causal, autoregressive_weight: 0.5}"),
]
SETTINGS = [
    "validation.interval=2",
    "checkpoint.interval=2",
    "checkpoint.keep_best=2",
    "checkpoint.average_at_end=true",
    "sampling.interval=4",
]


@pytest.fixture(scope="module")
def overrides(tiny_data, tmp_path_factory):
    """The stages as overrides; the second reads a copy of the data elsewhere."""
    other = tmp_path_factory.mktemp("other")
    for path in tiny_data.glob("train.*"):
        shutil.copy(path, other)
    stages = [
        f"schedule.stages.{name}={{tokens: {steps * STEP}, learning_rate: 0.01, {settings.replace('OTHER', f'{other}/train')}}}"
        for name, steps, settings in STAGES
    ]
    return ["~schedule.stages.warmup", "~schedule.stages.stable", *stages, *SETTINGS]


@pytest.fixture(scope="module")
def straight(tiny_data, overrides, tmp_path_factory):
    run = TinyRun(tiny_data, tmp_path_factory.mktemp("straight"))
    outcome = run.train(*overrides, world_size=2).require(0)
    return run, outcome.output


def test_each_step_is_recorded_under_its_stage(straight):
    run, output = straight
    recorded = [(record["stage"], record["block_size"]) for record in run.train_records()]
    sizes = {"ar": 1, "pairs": 4, "whole": LENGTH, "eight": 8, "last": 8}
    assert recorded == [(name, sizes[name]) for name, steps, _ in STAGES for _ in range(steps)]
    assert [("autoregressive_loss" in record) for record in run.train_records()] == [False] * 8 + [True] * 5
    rates = [record["learning_rate"] for record in run.train_records()]
    assert rates[6] == pytest.approx(0.01), "rewarmed within its one step"
    for line in ("stage ar: autoregressive", "stage pairs: block diffusion, 4 tokens", "stage whole: hybrid diffusion"):
        assert line in output


def test_phases_end_with_validation_checkpoint_and_average(straight):
    run, _ = straight
    validated = [(record["step"], record["stage"]) for record in run.metrics() if record["kind"] == "validation"]
    assert {(3, "ar"), (6, "pairs"), (8, "whole"), (13, "last")} <= set(validated)
    averages = [record for record in run.metrics() if record["kind"] == "average"]
    assert [record["step"] for record in averages] == [3, 6, 13], "a phase with one checkpoint has no average"
    # Members are of the phase: scores of other objectives do not compare.
    starts = {3: 0, 6: 3, 8: 6, 13: 8}
    for record in averages:
        assert all(step > starts[record["step"]] for step in record["members"]), record
    kept = run.steps_saved()
    best = sorted(step for step in kept if step > 8)
    scores = {step: read_scores(run.checkpoints / f"step_{step:010d}")["elbo"] for step in best}
    assert set(averages[-1]["members"]) == set(sorted(scores, key=scores.__getitem__)[:2])


IN_AND_BETWEEN_PHASES = [
    traps.before_record(2),
    traps.after_commit(2),  # the first phase's end, saved and not averaged
    traps.after_validation(2),
    traps.before_commit(2),
    traps.after_record(5),
    traps.after_commit(3),
]


@pytest.mark.parametrize(
    "deaths", [IN_AND_BETWEEN_PHASES[1:3], pytest.param(IN_AND_BETWEEN_PHASES, marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_killed_in_and_between_phases(straight, tiny_run, overrides, deaths):
    expected, _ = straight
    for trap in deaths:
        outcome = tiny_run.train(*overrides, world_size=2, sabotage=trap)
        assert outcome.killed, outcome.output
    tiny_run.train(*overrides, world_size=2).require(0)
    require_equal(tiny_run, expected)


@pytest.mark.slow
def test_future_stages_may_change_and_past_ones_may_not(tiny_run, overrides):
    outcome = tiny_run.train(*overrides, sabotage=traps.after_commit(3))
    assert outcome.killed
    past = tiny_run.train(*overrides, "schedule.stages.ar.diffusion.objective=diffusion").require(2)
    assert "schedule.stages.ar" in past.output
    assert "objective='autoregressive'" in past.output
    tiny_run.train(*overrides, "schedule.stages.eight.diffusion.block_size=16", "schedule.stages.last.diffusion.block_size=16").require(0)
    assert tiny_run.train_records()[-1]["block_size"] == 16


@pytest.mark.slow
def test_validation_at_other_block_sizes_is_what_training_at_them_sees(tiny_run, tiny_data, tmp_path):
    tiny_run.train("diffusion.block_size=4", f"validation.block_sizes=[8,{LENGTH}]", "checkpoint.interval=12").require(0)
    at_start = next(record for record in tiny_run.metrics() if record["kind"] == "validation")
    for size in (8, LENGTH):
        alone = TinyRun(tiny_data, tmp_path / str(size))
        alone.train(f"diffusion.block_size={size}", "schedule.stages.stable.tokens=256", "checkpoint.interval=100").require(0)
        first = next(record for record in alone.metrics() if record["kind"] == "validation")
        assert at_start[f"elbo_at_block_size/{size}"] == first["elbo"]
