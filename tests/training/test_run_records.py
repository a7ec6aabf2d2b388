"""The sentence about what the bits per byte of validation bound: it names the model of the text that the stage trains."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.training.run_records import describe_bound  # noqa: E402


@pytest.mark.parametrize(
    ("diffusion", "kind", "model"),
    [
        ({"objective": "autoregressive"}, "exactly -log2 p(text)", "one token after the other"),
        ({"block_size": 1}, "exactly -log2 p(text)", "one token after the other"),
        ({"block_size": 4}, "an estimate, from 10 noise levels with one mask each, of an upper bound (ELBO)", "blocks of 4 tokens"),
        ({"block_size": 32}, "upper bound", "all tokens of a sample together"),
        ({}, "upper bound", "all tokens of a sample together"),
        ({"objective": "uniform", "num_noise_ids": 96, "block_size": 1}, "with one draw of noise each, of an upper", "blocks of 1 tokens"),
        ({"noise_schedule": "cosine", "block_size": 1}, "an estimate", "blocks of 1 tokens"),
    ],
)
def test_the_bound_is_of_the_stages_model(diffusion, kind, model):
    sentence = describe_bound(tiny_config(diffusion=diffusion, data={"validation": "unused"}))
    assert sentence is not None
    assert kind in sentence
    assert model in sentence
    assert "samples of 32 tokens" in sentence


def test_a_run_without_validation_bounds_nothing():
    assert describe_bound(tiny_config()) is None
