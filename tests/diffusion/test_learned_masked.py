"""Masked diffusion with learned rates, against brute force, closed forms and published constants."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tiny import LENGTH, VOCAB_SIZE, packed_batch, tiny_config
from w1train.diffusion.corruption import corrupt, corrupt_at
from w1train.diffusion.learned_masked import EPSILON, LearnedMaskedProcess, log_probability, reconstruction
from w1train.diffusion.philox import Purpose, random_words

MASK = 4
RATES = torch.tensor([0.5, 1.0, 1.5, 3.0, 1.0], dtype=torch.float64)
DIFFUSION = {"objective": "learned_masked", "loss": "per_id", "coupled_draws": True}


def _process() -> LearnedMaskedProcess:
    return LearnedMaskedProcess(MASK).with_rates(RATES)


def _many_rates() -> torch.Tensor:
    return torch.linspace(0.3, 3.0, VOCAB_SIZE, dtype=torch.float64)


def _masked(t: float, rates: torch.Tensor = RATES) -> torch.Tensor:
    """Return q_t(mask | v) of each id."""
    return (1 - EPSILON) * t**rates


@pytest.mark.parametrize(("earlier", "t"), [(0.1, 0.6), (0.6, 1.0), (1e-3, 2e-3)])
def test_a_reverse_step_with_the_text_itself_gives_the_noise_of_the_earlier_time(earlier, t):
    ids = torch.tensor([0, 1, 2, 3] + [MASK] * 4)
    texts = torch.tensor([0, 1, 2, 3] * 2)
    probability = torch.cat([1 - _masked(t)[:4], _masked(t)[:4]])
    oracle = torch.nn.functional.one_hot(texts, 5).double()
    step = _process().reverse_probabilities(ids, oracle, *(torch.full((8,), time, dtype=torch.float64) for time in (t, earlier)))
    found = torch.zeros(4, 5, dtype=torch.float64).index_add(0, texts, probability[:, None] * step)
    expected = torch.cat([torch.diag(1 - _masked(earlier)[:4]), _masked(earlier)[:4, None]], dim=1)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_a_reverse_step_is_a_distribution_and_follows_bayes_rule():
    prediction = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0]], dtype=torch.float64)
    times = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    step = _process().reverse_probabilities(torch.tensor([MASK]), prediction, *times)
    # p(z_s = y | mask at t) = p(y | mask at t) p(y is kept at s | y is masked at t), where a masked token was kept at s with this share.
    kept = (_masked(0.7) - _masked(0.4)) / _masked(0.7)
    assert step[0, :4] == pytest.approx((prediction[0] * kept)[:4].numpy(), rel=1e-12)
    assert step.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("is_masked", [True, False])
def test_log_probability_and_its_gradient_are_those_of_the_formula(is_masked):
    rates, times = RATES[:4].clone().requires_grad_(), torch.tensor([0.01, 0.3, 0.99, 1.0], dtype=torch.float64)
    found = log_probability(rates, times, torch.full((4,), is_masked))
    plain = RATES[:4].clone().requires_grad_()
    masked = (1 - EPSILON) * times**plain
    expected = (masked if is_masked else 1 - masked).log()
    assert torch.allclose(found, expected, rtol=1e-9)
    (gradient,), (wanted,) = torch.autograd.grad(found.sum(), rates), torch.autograd.grad(expected.sum(), plain)
    assert gradient.isfinite().all()
    assert torch.allclose(gradient, wanted, rtol=1e-9)


def test_the_end_term_is_the_published_reconstruction():
    words, smallest = RATES[:4], 1e-3
    guess = torch.log_softmax(words * math.log(smallest), dim=0)
    found = reconstruction(RATES, torch.arange(4), smallest, MASK)
    assert torch.allclose(found, -_masked(smallest)[:4] * guess, rtol=1e-12)


def test_each_token_is_masked_where_its_word_is_below_its_own_probability():
    config, rates = tiny_config(diffusion=DIFFUSION), _many_rates()
    batch = packed_batch(range(8))
    noisy = corrupt_at(batch, config.diffusion, 5, 0.3, draw=2, rates=rates)
    words = random_words(5, batch.sample_indices, draw=2, purpose=Purpose.NOISE, num=LENGTH)
    expected = (words < ((1 - EPSILON) * 0.3 ** rates[batch.tokens] * 2**32).floor()) & batch.may_be_noised
    assert torch.equal(noisy.input_ids == config.diffusion.mask_token_id, expected)
    assert 0 < expected.sum() < expected.numel()


def test_rates_of_one_are_linear_masking_but_for_epsilon():
    diffusion, ones = tiny_config(diffusion=DIFFUSION).diffusion, torch.ones(VOCAB_SIZE)
    learned = corrupt_at(packed_batch(range(8)), diffusion, 5, 0.4 / (1 - EPSILON), draw=1, rates=ones)
    linear = corrupt_at(packed_batch(range(8)), tiny_config().diffusion, 5, 0.4, draw=1)
    assert torch.equal(learned.input_ids, linear.input_ids)


def test_coupled_draws_share_t_and_cut_and_nothing_else():
    config = tiny_config(diffusion=DIFFUSION | {"timestep_per": "document", "random_length_probability": 0.5})
    texts = packed_batch([index // 2 for index in range(16)])
    texts.sample_indices = torch.arange(16)
    noisy = corrupt(texts, config.diffusion, 3, rates=_many_rates())
    times = noisy.segment_timesteps.reshape(16, -1)
    assert torch.equal(times[::2], times[1::2])
    assert len(times[::2, 0].unique()) == 8
    assert torch.equal(noisy.document_ids[::2], noisy.document_ids[1::2])
    assert (noisy.document_ids == -1).any(dim=1)[::2].unique().numel() == 2, "some pairs are cut"
    masked = noisy.input_ids == config.diffusion.mask_token_id
    both = (masked[::2] & masked[1::2]).sum() / masked[::2].sum()
    assert not torch.equal(masked[::2], masked[1::2])
    assert 0.2 < both < 0.95, "each sample has its own words"


def test_noise_does_not_depend_on_the_micro_batch():
    diffusion, rates = tiny_config(diffusion=DIFFUSION).diffusion, _many_rates()
    whole = corrupt(packed_batch(range(8)), diffusion, 3, rates=rates)
    parts = [corrupt(packed_batch(range(first, first + 2)), diffusion, 3, rates=rates) for first in range(0, 8, 2)]
    assert torch.equal(whole.input_ids, torch.cat([part.input_ids for part in parts]))
