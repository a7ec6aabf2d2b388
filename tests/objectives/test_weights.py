"""Weights: published values, limits, positions, and what a weight may see."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.tiny import VOCAB_SIZE, packed_batch
from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.diffusion.corruption import NoisyBatch, corrupt
from w1train.objectives.objective import objective_of

MASK = 14
# w_lambda of the scaling study of GIDD with b = 0, five ids: (clean, wrong, mask) at t = .1, .5 and .9.
LOG_SNR = {0.1: (0.021951, 0.9, 1.9), 0.5: (0.055556, 0.5, 1.5), 0.9: (0.018367, 0.1, 1.1)}
ELBO_OF_HYBRID = {0.1: (0.222222, 5.555556, 11.111111), 0.5: (0.222222, 2.0, 4.0), 0.9: (1.515152, 5.555556, 11.111111)}


def _noisy(config: DiffusionConfig, t: float, target: int, seen: list[int]) -> NoisyBatch:
    """A sample of one token, seen in several ways."""
    tokens = torch.full((1, len(seen)), target)
    zeros = torch.zeros_like(tokens)
    batch = PackedBatch(tokens, zeros.int(), zeros.int(), torch.tensor([0]))
    noisy = corrupt(batch, config, seed=1)
    inputs = torch.tensor([seen])
    return dataclasses.replace(
        noisy,
        input_ids=inputs,
        target_inputs=inputs,
        target_is_noised=torch.ones_like(inputs, dtype=torch.bool),
        target_timesteps=torch.full_like(noisy.target_timesteps, t, dtype=torch.float64),
    )


def _weights(t: float, **given: object) -> list[float]:
    """Return the weights of a token that is clean, wrong and masked, in a vocabulary of four words and a mask."""
    config = DiffusionConfig(mask_token_id=4, num_noise_ids=5, random_length_probability=0.0, **given)
    return objective_of(config, 10).weights(_noisy(config, t, 1, [1, 0, 4]))[0].tolist()


@pytest.mark.parametrize("t", LOG_SNR)
def test_the_weights_by_signal_are_the_published_ones(t):
    given = {"objective": "log_snr", "loss": "kl_is", "weight": "log_snr"}
    assert _weights(t, **given) == pytest.approx(LOG_SNR[t], abs=2e-6)


@pytest.mark.parametrize("t", ELBO_OF_HYBRID)
def test_the_weights_of_gidd(t):
    """The dynamic weights are the bound's weights in proportion to that of a wrong token, and at most 2."""
    given = {"objective": "hybrid", "uniform_share": 0.2, "loss": "kl_is"}
    elbo = ELBO_OF_HYBRID[t]
    for name in ("elbo", "inverse_t"):
        assert _weights(t, **given, weight=name) == pytest.approx(elbo, abs=2e-6)
    assert _weights(t, **given, weight="gidd_dynamic") == pytest.approx([weight / elbo[1] for weight in elbo], rel=1e-5)
    assert _weights(t, **given, weight="gidd_dynamic", weight_max=0.5)[1:] == [0.5, 0.5]
    assert _weights(t, **given, weight_min=1.0, weight_max=3.0) == pytest.approx([min(max(weight, 1), 3) for weight in elbo], abs=2e-6)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_the_weights_by_signal_of_a_cross_entropy_are_one_minus_t(t):
    assert _weights(t, weight="log_snr")[2] == pytest.approx(1 - t)


@pytest.mark.parametrize("t", [1e-5, 1.0])
@pytest.mark.parametrize(
    "given",
    [
        {"objective": "log_snr", "loss": "kl_is", "weight": "log_snr"},
        {"objective": "log_snr", "loss": "kl_is", "weight": "gidd_dynamic"},
        {"objective": "hybrid", "loss": "finite_kl", "num_timesteps": 10, "weight": "log_snr"},
        {"noise_schedule": "cosine", "num_timesteps": 10, "weight": "log_snr"},
    ],
    ids=str,
)
def test_weights_by_signal_are_finite_where_the_noise_does_not_change(given, t):
    """A log-SNR mixture is constant near t = 0 and t = 1, and a cosine at t = 1. A single NaN would spoil the loss of a step."""
    assert all(0 <= weight < math.inf for weight in _weights(t, **given))


def test_a_masked_token_counts_by_the_visible_tokens_around_it():
    """CART of Dream, with p = .3 and two visible tokens."""
    config = DiffusionConfig(weight="cart", cart_probability=0.3, random_length_probability=0.0)
    weights = objective_of(config, 10).weights(_noisy(config, 0.5, 1, [1, MASK, MASK, 1, MASK, MASK]))[0]
    assert weights[[1, 2, 4, 5]].tolist() == pytest.approx([0.255, 0.255, 0.20145, 0.141015], rel=1e-6)


@pytest.mark.parametrize("shift", [False, True])
def test_cart_sees_its_own_document_alone(shift):
    """The weight is the sum of its definition, and the output that predicts a token has the token's weight."""
    config = DiffusionConfig(weight="cart", shift=shift, random_length_probability=0.0, num_strata=8)
    noisy = corrupt(packed_batch(range(6)), config, seed=1)
    weights, p = objective_of(config, 10).weights(noisy), config.cart_probability
    for row, column in noisy.loss_mask.nonzero()[::5].tolist():
        place, documents = column + shift, noisy.document_ids[row]
        visible = (documents == documents[place]) & (noisy.input_ids[row] != MASK)
        distances = [abs(place - other) for other in visible.nonzero()[:, 0].tolist()]
        expected = sum(p / 2 * (1 - p) ** (distance - 1) for distance in distances)
        assert float(weights[row, column]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("objective", ["diffusion", "uniform"])
def test_positions(objective):
    """Tokens that noise has kept have a row where they are trained or are part of the bound, and a weight where they are trained."""
    given = {"objective": objective, "weight": "constant", "num_noise_ids": 20, "random_length_probability": 0.0}
    batch = packed_batch(range(6), vocab_size=20)
    for positions, has_kept_rows in (("noised", False), ("changed", False), ("all", True), ("auto", False)):
        config = DiffusionConfig(loss_positions=positions, **given)
        noisy = corrupt(batch, config, seed=1)
        weights = objective_of(config, 10).weights(noisy)[noisy.has_target]
        noised = noisy.target_is_noised[noisy.has_target]
        changed = (noisy.input_ids != noisy.tokens)[noisy.has_target]
        expected = {"noised": noised, "changed": changed, "all": torch.ones_like(noised), "auto": noised}[positions]
        assert torch.equal(weights.bool() & noised, expected & noised)
        assert bool((noised & ~changed).any()) == (objective == "uniform"), "some tokens are replaced by themselves"
        assert torch.equal(noisy.loss_mask, noisy.has_target if has_kept_rows or objective == "uniform" else noisy.target_is_noised)
    assert VOCAB_SIZE > 20
