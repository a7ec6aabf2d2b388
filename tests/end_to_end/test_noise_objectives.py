"""A run with a loss on all tokens, in pairs of samples and discrete time: it resumes bit for bit, and its configuration says what it
predicts."""

from __future__ import annotations

import pytest

from tests.end_to_end.runs import VOCAB_SIZE, TinyRun
from w1train.config.serialization import config_from_yaml

OPTIONS = (
    "diffusion.objective=hybrid",
    f"diffusion.num_noise_ids={VOCAB_SIZE}",
    "diffusion.loss=finite_kl",
    "diffusion.num_timesteps=16",
    "diffusion.cross_entropy_weight=0.01",
    "diffusion.antithetic=true",
    "diffusion.block_size=8",
    "sampling.interval=1000",
    "validation.interval=6",
    "checkpoint.interval=6",
)


@pytest.mark.slow
def test_resumes_bit_for_bit(tiny_run, tiny_data, tmp_path):
    undisturbed = TinyRun(tiny_data, tmp_path / "undisturbed")
    undisturbed.train(*OPTIONS).require(0)
    tiny_run.train(*OPTIONS, "--max-steps", "4").require(0)
    tiny_run.train(*OPTIONS).require(0)
    assert tiny_run.metrics() == undisturbed.metrics()
    record = tiny_run.train_records()[0]
    assert record["elbo"] == pytest.approx(sum(record[f"elbo_{kind}"] for kind in ("clean", "wrong", "mask")))
    assert record["cross_entropy_of_every_token"] > 0
    assert config_from_yaml(tiny_run.path / "config.yaml").diffusion.prediction == "leave_one_out"
