"""A run that learns rates of noise: trained, validated, sampled, and resumed bit for bit."""

from __future__ import annotations

import pytest

from tests.end_to_end.runs import BATCH, LENGTH, TinyRun

OPTIONS = (
    "diffusion.objective=learned_masked",
    "diffusion.loss=per_id",
    "diffusion.coupled_draws=true",
    "model.learns_noise_rates=true",
    f"schedule.stages.stable.tokens={3 * BATCH * LENGTH}",
    "training.precision=bf16",
    "checkpoint.interval=2",
    "validation.interval=2",
    "sampling.interval=4",
    "+optimizer.rate_multipliers={noise_rates.*: 10}",
)


@pytest.mark.slow
def test_a_resumed_run_is_the_undisturbed_one(tiny_data, tmp_path):
    straight, resumed = TinyRun(tiny_data, tmp_path / "straight"), TinyRun(tiny_data, tmp_path / "resumed")
    straight.train(*OPTIONS).require(0)
    resumed.train(*OPTIONS, "--max-steps", "3").require(0)
    resumed.train(*OPTIONS).require(0)
    assert resumed.steps_saved()[-1] == 5
    assert resumed.metrics() == straight.metrics()
