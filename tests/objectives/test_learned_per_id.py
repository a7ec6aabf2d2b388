"""The loss of learned rates: its published value, and the mean of its gradient over every pair of draws, by enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.tiny import VOCAB_SIZE, packed_batch, tiny_config
from w1train.diffusion.corruption import NoisyBatch, corrupt_at
from w1train.diffusion.learned_masked import EPSILON, rates_at, reconstruction
from w1train.diffusion.processes import noise_process
from w1train.model.row_terms import WeightedCrossEntropy, value_of
from w1train.objectives.integral import integral_of, needs_reconstruction
from w1train.objectives.learned_per_id import LearnedPerIdLoss
from w1train.objectives.loss_rows import loss_rows

MASK = 3
TEXT = (1, 0, 2, 2)
MAY_BE_NOISED = (True, False, True, True)
SEGMENTS = (0, 0, 0, 1)
TIMES = (0.3, 0.8)
DIFFUSION = {
    "objective": "learned_masked",
    "loss": "per_id",
    "coupled_draws": True,
    "mask_token_id": MASK,
    "timestep_per": "document",
    "random_length_probability": 0.0,
}


def _loss() -> LearnedPerIdLoss:
    diffusion = tiny_config(diffusion=DIFFUSION).diffusion
    return LearnedPerIdLoss(diffusion, noise_process(diffusion))


def _masks() -> Iterator[tuple[bool, ...]]:
    """Every draw of the noise."""
    for masks in itertools.product((False, True), repeat=len(TEXT)):
        if all(may or not mask for mask, may in zip(masks, MAY_BE_NOISED, strict=True)):
            yield masks


def _batch(draws: list[tuple[bool, ...]], rates: Tensor) -> NoisyBatch:
    """The same text with each of the draws, as a micro-batch."""
    masked, size = torch.tensor(draws), len(draws)
    times, segments = torch.tensor(TIMES), torch.tensor(SEGMENTS).expand(size, -1)
    batch = corrupt_at(packed_batch(range(size), len(TEXT)), _loss().config, 0, 0.5, draw=1, rates=torch.ones(VOCAB_SIZE))
    tokens = torch.tensor(TEXT).expand(size, -1)
    return dataclasses.replace(
        batch,
        tokens=tokens,
        targets=tokens,
        input_ids=torch.where(masked, MASK, tokens),
        target_inputs=torch.where(masked, MASK, tokens),
        target_is_noised=masked,
        loss_mask=masked,
        has_target=torch.tensor(MAY_BE_NOISED).expand(size, -1),
        target_timesteps=times[segments],
        target_segments=segments,
        segment_timesteps=times.repeat(size),
        noise_rates=rates,
    )


def _predictions(masks: tuple[bool, ...]) -> Tensor:
    """Return the logarithm of a model's distribution of each token, float64 [l, 3], which depends on the masks of the token's segment."""
    logits = torch.empty(len(TEXT), 3, dtype=torch.float64)
    for place, segment in enumerate(SEGMENTS):
        seen = [mask for mask, other in zip(masks, SEGMENTS, strict=True) if other == segment]
        seed = 1000 * place + sum(2**bit for bit, mask in enumerate(seen) if mask)
        logits[place] = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.log_softmax(dim=-1)


def _densities(masks: tuple[bool, ...], rates: Tensor) -> Tensor:
    """The loss of each masked token, by its formula."""
    places = [place for place, mask in enumerate(masks) if mask]
    words, times = torch.tensor(TEXT)[places], torch.tensor(TIMES, dtype=torch.float64)[torch.tensor(SEGMENTS)[places]]
    predictions = _predictions(masks)[places]
    of_text = rates[words] * (-predictions.gather(1, words[:, None])[:, 0] - 1)
    return (of_text + (rates[:3] * predictions.exp()).sum(dim=1)) / times


def _probability(masks: tuple[bool, ...], rates: Tensor) -> Tensor:
    """Return q(z | x)."""
    result = rates.new_ones(())
    for word, mask, may, segment in zip(TEXT, masks, MAY_BE_NOISED, SEGMENTS, strict=True):
        masked = (1 - EPSILON) * TIMES[segment] ** rates[word]
        result = result * (masked if mask else 1 - masked) if may else result
    return result


def _rates() -> Tensor:
    return torch.tensor([0.5, 1.2, 1.7, 1.0], dtype=torch.float64, requires_grad=True)


def _bound(rates: Tensor, *, through_noise: bool = True) -> Tensor:
    """The mean over the noise of the negative ELBO of the text at the given times, divided by the length of the integral over t."""
    end = reconstruction(rates, torch.tensor(TEXT), 1e-3, MASK)[torch.tensor(MAY_BE_NOISED)].sum() / (1 - 1e-3)
    weights = {masks: _probability(masks, rates) for masks in _masks()}
    return end + sum((p if through_noise else p.detach()) * _densities(masks, rates).sum() for masks, p in weights.items())


def _gradient(value: Tensor, rates: Tensor) -> Tensor:
    return torch.autograd.grad(value, rates)[0][:3]


def test_the_value_is_the_published_one():
    rates = torch.tensor([0.5, 1.0, 1.5, 3.0], dtype=torch.float64)
    term = WeightedCrossEntropy(torch.tensor([1]), rates, torch.tensor([0.3], dtype=torch.float64), rates_at)
    assert value_of(term, torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()).item() == pytest.approx(4.34657601, abs=1e-8)


def test_the_mean_gradient_of_pairs_is_that_of_the_bound():
    loss, mean = _loss(), torch.zeros(3, dtype=torch.float64)
    for pair in itertools.product(_masks(), repeat=2):
        rates = _rates()
        rows = loss_rows(_batch(list(pair), rates), torch.ones(2, len(TEXT)))
        values = {"per_id": torch.cat([_densities(masks, rates) for masks in pair])}
        probability = _probability(pair[0], rates) * _probability(pair[1], rates)
        mean += probability.detach() * _gradient(loss.total(values, rows), rates)
    rates = _rates()
    expected = 2 * _gradient(_bound(rates), rates)
    assert torch.allclose(mean, expected, rtol=0, atol=1e-6), "the timesteps of a batch are float32"
    without_score = 2 * _gradient(_bound(rates, through_noise=False), rates)
    assert (without_score - expected).abs().max() > 0.1, "the draws matter"


def test_the_logged_sums_have_no_score_term():
    loss, rates = _loss(), _rates()
    pair = [(True, False, False, True), (False, False, True, True)]
    rows = loss_rows(_batch(pair, rates), torch.ones(2, len(TEXT)))
    values = {"per_id": torch.cat([_densities(masks, rates) for masks in pair])}
    end = 2 / (1 - 1e-3) * reconstruction(rates, torch.tensor(TEXT), 1e-3, MASK)[torch.tensor(MAY_BE_NOISED)].sum()
    assert loss.end_terms(rows).item() == pytest.approx(end.item(), rel=1e-12)
    with torch.no_grad():
        rows.learned_noise.rates = rates.detach()
        assert loss.total(values, rows).item() == pytest.approx((values["per_id"].sum() + end).item(), rel=1e-12)


def test_only_one_rank_of_those_that_share_the_vocabulary_has_the_gradient_of_whole_numbers():
    loss, rates = _loss(), _rates()
    pair = [(True, False, False, True), (False, False, True, True)]
    rows = loss_rows(_batch(pair, rates), torch.ones(2, len(TEXT)))
    rows.learned_noise.counts_once = False
    found, wanted = (torch.cat([_densities(masks, rates) for masks in pair]) for _ in range(2))
    assert torch.equal(_gradient(loss.total({"per_id": found}, rows), rates), _gradient(wanted.sum(), rates))


@pytest.mark.parametrize("t_min", [1e-3, 0.2])
def test_the_parts_of_the_bound_add_up_to_the_entropy(t_min):
    """A text of one word, all words alike, has the entropy log 3, and the exact prediction at a mask reaches it with every t_min."""
    rates = torch.tensor([0.7, 1.0, 2.0, 0.0], dtype=torch.float64)
    config = dataclasses.replace(_loss().config, t_min=t_min)
    fractions = ((torch.arange(40_000) + 0.5) / 40_000).tolist()
    integral = integral_of(config, fractions)
    times = torch.tensor(integral.timesteps, dtype=torch.float64)[:, None]
    masked = times ** rates[:MASK]
    posterior = masked / masked.sum(dim=1, keepdim=True)
    losses = (rates[:MASK] * (-posterior.log() - 1) + (rates[:MASK] * posterior).sum(dim=1, keepdim=True)) / times
    densities = (1 - EPSILON) * (masked * losses).mean(dim=1)
    rows = loss_rows(_batch([(True, False, False, True)], rates.requires_grad_()), torch.ones(1, len(TEXT)))
    rows.learned_noise.tokens = torch.arange(MASK)[None]
    rows.learned_noise.can_be_noised = torch.ones(1, MASK, dtype=torch.bool)
    end = LearnedPerIdLoss(config, noise_process(config)).end_terms(rows).item() / MASK
    bound = sum(rate * (density + end) for rate, density in zip(integral.rates, densities.tolist(), strict=True)) / len(fractions)
    assert not needs_reconstruction(noise_process(config), integral.first), "the loss has the end term"
    assert bound == pytest.approx((1 - EPSILON) * math.log(MASK), abs=2e-5)
