"""A run with adapters: it begins from another run, is validated, sampled, averaged, resumed bit for bit, and followed by a merged run."""

from __future__ import annotations

import pytest

from tests.end_to_end.runs import BATCH, LENGTH, TinyRun

OPTIONS = (
    f"schedule.stages.stable.tokens={3 * BATCH * LENGTH}",
    "training.precision=bf16",
    "checkpoint.interval=2",
    "checkpoint.keep_best=2",
    "validation.interval=2",
    "sampling.interval=4",
)
ADAPTERS = ("adapters.rank=2", "adapters.alpha=8")


def _validations(run):
    return [record["elbo"] for record in run.metrics() if record["kind"] == "validation"]


@pytest.mark.slow
def test_a_run_with_adapters_resumes_and_is_the_beginning_of_a_merged_run(tiny_data, undisturbed, tmp_path):
    base = undisturbed(1, "bf16")
    begin = (*OPTIONS, *ADAPTERS, f"training.initial_weights={base.path}")
    straight, resumed, merged = (TinyRun(tiny_data, tmp_path / name) for name in ("straight", "resumed", "merged"))
    outcome = straight.train(*begin).require(0)
    assert "of which are trained (adapters of rank 2)" in outcome.output
    resumed.train(*begin, "--max-steps", "3").require(0)
    resumed.train(*begin).require(0)
    assert resumed.metrics() == straight.metrics()
    assert _validations(straight)[0] == _validations(base)[-1] != _validations(straight)[-1]
    assert straight.samples()
    outcome = merged.train(*OPTIONS, f"training.initial_weights={straight.path}", "--max-steps", "1").require(0)
    assert "are added to its weights" in outcome.output
    assert _validations(merged)[0] == pytest.approx(_validations(straight)[-1], rel=1e-3)
