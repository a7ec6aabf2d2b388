"""A run of confidence-aware training: it resumes bit for bit, and a step that is computed again is the same step."""

from __future__ import annotations

import pytest

from tests.end_to_end import traps
from tests.end_to_end.runs import BATCH, LENGTH, TinyRun

OPTIONS = (
    "diffusion.confidence_weight=2",
    "diffusion.confidence_temperature=0.5",
    "diffusion.block_size=8",
    "sampling.interval=1000",
    f"schedule.stages.stable.tokens={4 * BATCH * LENGTH}",
)


@pytest.mark.slow
def test_resumes_and_computes_a_step_again_bit_for_bit(tiny_data, tmp_path):
    straight, disturbed = TinyRun(tiny_data, tmp_path / "straight"), TinyRun(tiny_data, tmp_path / "disturbed")
    straight.train(*OPTIONS, world_size=2).require(0)
    nan_in_step_2 = traps.nan_in_gradient(rank=1, steps=[2], times=1)
    outcome = disturbed.train(*OPTIONS, "--max-steps", "4", world_size=2, sabotage=nan_in_step_2).require(0)
    assert "step 2: a transient fault" in outcome.output
    disturbed.train(*OPTIONS, world_size=2).require(0)
    assert disturbed.metrics() == straight.metrics()
    record = straight.train_records()[0]
    assert record["loss"] == pytest.approx(record["elbo"] + 2 * record["entropy_of_correct"]), "the weight makes the rest the bound"
