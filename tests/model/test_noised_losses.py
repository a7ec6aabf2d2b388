"""The losses of uniform, hybrid, masked and per-id noise: published numbers, limits, and identities between the losses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.kernels import oracle, row_terms
from w1train.model.chunked_head import linear_row_terms
from w1train.model.row_terms import (
    CrossEntropy,
    FiniteKl,
    KlIs,
    LogProbabilities,
    MeanLogProbability,
    Reconstruction,
    ScoreEntropy,
    WeightedCrossEntropy,
    value_of,
)

TARGET, WRONG, MASK = 1, 0, 4
OF_FOUR = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
TIMES = (0.1, 0.5, 0.9)


def _masked(t):
    return 1 - t, 0 * t, t


def _cosine(t):
    noised = torch.cos(math.pi / 2 * (1 - t))
    return 1 - noised, 0 * t, noised


def _uniform(t):
    return 1 - t, t / 4, 0 * t


def _gidd(share):
    def noise(t):
        words = 2 * share / (1 - share) * (t * (1 - t)).sqrt()
        return (1 - t) / (1 + words), words / (1 + words) / 4, t / (1 + words)

    return noise


def _log_snr(t):
    """Return the mixture with slope 1 and shift 0, whose share of words is 1 - t."""
    return 1 - t, t * (1 - t) / 4, t * t


GOLDEN = [
    (_masked, MASK, (12.039728, 2.407946, 1.337748)),
    (_cosine, MASK, (11.940542, 1.891196, 0.299536)),
    (_uniform, TARGET, (0.567798, 0.583911, 0.346303)),
    (_uniform, WRONG, (29.969951, 2.473074, 0.286192)),
    (_gidd(0.1), TARGET, (0.193729, 0.134840, 0.512019)),
    (_gidd(0.1), WRONG, (16.915939, 3.252914, 3.218486)),
    (_gidd(0.1), MASK, (9.807459, 1.601487, 0.682604)),
    (_gidd(0.2), TARGET, (0.370796, 0.213943, 0.553473)),
    (_gidd(0.2), WRONG, (12.165216, 1.924625, 1.386442)),
    (_gidd(0.2), MASK, (8.161614, 1.156532, 0.441685)),
    (_log_snr, TARGET, (0.467178, 0.230006, 0.111073)),
    (_log_snr, WRONG, (28.022441, 2.069192, 0.488749)),
    (_log_snr, MASK, (19.215486, 2.168497, 0.711618)),
]


def _row(value):
    return torch.as_tensor(value, dtype=torch.float64).reshape(1)


def _noise_at(process, t, z):
    """Return alpha, c of a word and c(z), and the weight r(z) / q(z | x) of the bound, by autograd, at one t."""
    t = _row(t).requires_grad_()
    alpha, word, mask = process(t)
    at_input = mask if z == MASK else word
    alpha_rate, rate = (torch.autograd.grad(value.sum(), t, retain_graph=True, allow_unused=True)[0] for value in (alpha, at_input))
    jumps = (0 if rate is None else rate) - alpha_rate / alpha * at_input
    weight = jumps / (at_input + alpha * (z == TARGET))
    return alpha.detach(), word.detach(), at_input.detach(), weight.detach()


def _ids(z):
    return torch.tensor([TARGET]), torch.tensor([z])


@pytest.mark.parametrize(("process", "z", "wanted"), GOLDEN)
def test_published_densities_of_the_bound(process, z, wanted):
    for t, density in zip(TIMES, wanted, strict=True):
        alpha, word, at_input, weight = _noise_at(process, t, z)
        found = weight * value_of(KlIs(*_ids(z), alpha, word, at_input), OF_FOUR.log()[None])
        assert found.item() == pytest.approx(density, abs=6e-7)


@pytest.mark.parametrize(("t", "z", "wanted"), [(0.3, 1, 0.63694822), (0.3, 0, 6.93648166), (0.8, 1, 0.66212257), (0.8, 3, 0.48144020)])
def test_published_densities_of_five_words(t, z, wanted):
    logits = torch.tensor([[0.35, 0.25, 0.2, 0.15, 0.05]], dtype=torch.float64).log()
    alpha, noise = _row(1 - t), _row(t / 5)
    weight = (1 + t / (1 - t)) / 5 / (noise + alpha * (z == TARGET))
    assert (weight * value_of(KlIs(*_ids(z), alpha, noise, noise), logits)).item() == pytest.approx(wanted, abs=6e-9)


@pytest.mark.parametrize(
    ("process", "z", "wanted"),
    [
        (_masked, MASK, (0.60198640, 0.40132427)),
        (_uniform, TARGET, (0.16052275, 0.15505807)),
        (_uniform, WRONG, (0.77520543, 0.29436790)),
        (_gidd(0.2), TARGET, (0.05928320, 0.06532367)),
        (_gidd(0.2), WRONG, (0.56960221, 0.34010428)),
        (_gidd(0.2), MASK, (0.34539459, 0.19275532)),
    ],
)
def test_published_values_of_four_steps(process, z, wanted):
    for s, value in zip((0.25, 0.5), wanted, strict=True):
        assert value_of(_finite(process, s, s + 0.25, z), OF_FOUR.log()[None]).item() == pytest.approx(value, abs=6e-9)


def _finite(process, s, t, z, mask=None):
    alpha, _, at_input = process(_row(t))
    earlier_alpha, earlier_word, earlier_mask = process(_row(s))
    at_input = at_input if z == MASK else process(_row(t))[1]
    earlier_input = earlier_mask if z == MASK else earlier_word
    with_mask = () if mask is None else (mask, earlier_mask)
    return FiniteKl(*_ids(z), alpha, at_input, earlier_alpha, earlier_word, earlier_input, *with_mask)


def test_published_value_of_a_model_that_predicts_the_mask():
    logits = torch.tensor([[0.36, 0.27, 0.18, 0.09, 0.1]], dtype=torch.float64).log()
    assert value_of(_finite(_masked, 0.25, 0.5, MASK, mask=MASK), logits).item() == pytest.approx(0.61879471, abs=6e-9)


def _learned_rates(table, timesteps):
    return table / timesteps


def test_published_value_and_gradient_of_learned_rates():
    table = torch.tensor([0.5, 1.0, 1.5, 3.0], dtype=torch.float64, requires_grad=True)
    term = WeightedCrossEntropy(torch.tensor([TARGET]), table, _row(0.3), _learned_rates)
    assert value_of(term, OF_FOUR[None, :4].log()).item() == pytest.approx(4.34657601, abs=6e-9)
    rows = OF_FOUR[None, :4].log().float().requires_grad_()
    narrow = WeightedCrossEntropy(torch.tensor([TARGET]), table.detach().float().requires_grad_(), _row(0.3), _learned_rates)
    linear_row_terms(rows, torch.eye(4), [narrow], oracle.one_rank(3))[0].sum().backward()
    wanted = (OF_FOUR[:4] + (torch.arange(4) == TARGET) * (-math.log(0.3) - 1)) / 0.3
    torch.testing.assert_close(narrow.table.grad.double(), wanted, rtol=1e-6, atol=1e-6)


def test_equal_rates_weigh_the_cross_entropy():
    table, logits = torch.full((5,), 2.0, dtype=torch.float64), OF_FOUR.log()[None]
    term = WeightedCrossEntropy(torch.tensor([TARGET]), table, _row(0.5), _learned_rates)
    assert value_of(term, logits).item() == pytest.approx(4 * value_of(CrossEntropy(torch.tensor([TARGET])), logits).item(), rel=1e-14)


@pytest.mark.parametrize(("process", "z"), [(_masked, MASK), (_uniform, TARGET), (_uniform, WRONG)])
@pytest.mark.parametrize("t", TIMES)
def test_score_entropy_of_normalised_scores_is_the_bound(process, z, t):
    alpha, word, at_input, _ = _noise_at(process, t, z)
    laws = alpha * OF_FOUR + word
    scores = (laws / (at_input + alpha * OF_FOUR[z])).log()[None]
    if z == MASK:
        scores[0, MASK] = float("-inf")
    term = ScoreEntropy(*_ids(z), alpha, word, at_input, torch.zeros(1))
    if z != MASK:
        scores = scores[:, :4]
    wanted = value_of(KlIs(*_ids(z), alpha, word, at_input), OF_FOUR[None, : scores.shape[1]].log())
    torch.testing.assert_close(value_of(term, scores), wanted, rtol=1e-12, atol=1e-12)


def test_scores_too_large_by_a_factor_pay_for_it():
    """1.3 times the score costs (1.3 - 1 - log 1.3) / t more."""
    term = ScoreEntropy(*_ids(MASK), _row(0.8), _row(0), _row(0.2), _row(math.log(1.3 * 4)))
    more = value_of(term, OF_FOUR.log()[None]) - 0.8 * value_of(CrossEntropy(torch.tensor([TARGET])), OF_FOUR.log()[None])
    assert (more / 0.8 / 0.2).item() == pytest.approx(0.18818, abs=1e-5)


def _random_rows(num_rows, vocabulary, spread):
    logits = spread * torch.randn((num_rows, vocabulary), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return logits, torch.arange(num_rows) % vocabulary, (torch.arange(num_rows) * 3) % vocabulary


@pytest.mark.parametrize("spread", [1, 30])
def test_the_full_posterior_without_what_was_observed_is_the_leave_one_out_posterior(spread):
    logits, targets, inputs = _random_rows(8, 6, spread)
    alpha = torch.linspace(0.01, 0.999, 8, dtype=torch.float64)
    noise = (1 - alpha) / 6
    observed = (1 + alpha / noise).log()
    full = logits.scatter_add(1, inputs[:, None], observed[:, None])
    wanted = value_of(KlIs(targets, inputs, alpha, noise, noise), logits)
    torch.testing.assert_close(value_of(KlIs(targets, inputs, alpha, noise, noise, observed), full), wanted, rtol=1e-10, atol=1e-10)
    posterior = value_of(Reconstruction(targets, inputs, observed), logits)
    torch.testing.assert_close(posterior, value_of(CrossEntropy(targets), full), rtol=1e-12, atol=1e-12)
    zero, clean = torch.zeros_like(alpha), torch.ones_like(alpha)
    last = FiniteKl(targets, inputs, alpha, noise, clean, zero, zero)
    torch.testing.assert_close(value_of(last, logits), posterior, rtol=1e-10, atol=1e-10)


def test_many_steps_tend_to_the_bound():
    for z, process in itertools.product((TARGET, WRONG, MASK), (_gidd(0.2), _log_snr)):
        alpha, word, at_input, weight = _noise_at(process, 0.5, z)
        density = weight * value_of(KlIs(*_ids(z), alpha, word, at_input), OF_FOUR.log()[None])
        steps = 1e6 * value_of(_finite(process, 0.5 - 1e-6, 0.5, z), OF_FOUR.log()[None])
        assert steps.item() == pytest.approx(density.item(), rel=1e-4)


def test_mean_log_probability_is_the_mean_of_log_probabilities():
    logits, _, _ = _random_rows(4, 6, 3)
    every = value_of(LogProbabilities(torch.arange(6).expand(4, 6)), logits)
    torch.testing.assert_close(value_of(MeanLogProbability(), logits), every.mean(dim=1))


# Limits.


def test_without_noise_on_words_it_is_alpha_times_the_cross_entropy_bit_for_bit():
    logits, targets, _ = _random_rows(20, 6, 10)
    logits = torch.cat([logits, torch.full((20, 1), float("-inf"), dtype=torch.float64)], dim=1)
    alpha = torch.linspace(0, 1 - 1e-9, 20, dtype=torch.float64)
    inputs = torch.full((20,), 6)
    found = value_of(KlIs(targets, inputs, alpha, 0 * alpha, 1 - alpha), logits)
    cross_entropy = value_of(CrossEntropy(targets), logits)
    torch.testing.assert_close(found, alpha * cross_entropy, rtol=1e-15, atol=1e-15)
    rows, weight = logits[:, :6].float().requires_grad_(), torch.cat([torch.eye(6), torch.zeros((1, 6))])
    # The second term has tokens that noise puts nothing on, so no jump leads to them.
    terms = [KlIs(targets, inputs, alpha, 0 * alpha, 1 - alpha), KlIs(targets, targets, alpha, 0 * alpha, 0 * alpha), CrossEntropy(targets)]
    *bounds, plain = linear_row_terms(rows, weight, terms, oracle.one_rank(7, excluded=6))
    (wanted,) = torch.autograd.grad(plain, rows, alpha.float(), retain_graph=True)
    for of_bound in bounds:
        torch.testing.assert_close(of_bound, alpha.float() * plain, rtol=1e-6, atol=1e-7)
        (found,) = torch.autograd.grad(of_bound, rows, torch.ones(20), retain_graph=True)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


EXTREMES = list(itertools.product((0.0, 1e-12, 1e-3, 0.5, 1.0), (0.0, 1e-30, 1e-12, 1e-6, 0.1), (TARGET, WRONG, MASK)))


@pytest.mark.parametrize("spread", [0.01, 3, 60])
@pytest.mark.parametrize("is_full", [False, True])
def test_extremes_of_noise_and_of_predictions(spread, is_full):
    """In fp32 the values and gradients are those of the definition in float64, but for the rounding of the probabilities."""
    alpha, word, z = (torch.tensor(values) for values in zip(*EXTREMES, strict=True))
    alpha, word, targets = alpha.double(), word.double(), torch.full_like(z, TARGET)
    at_input = torch.where(z == MASK, 0.3, word)
    keep = (at_input > 0) & (alpha + word > 0)
    alpha, word, targets, z, at_input = (values[keep] for values in (alpha, word, targets, z, at_input))
    logits = (spread * torch.randn((len(z), 5), generator=torch.Generator().manual_seed(8))).double()
    logits[:, MASK] = float("-inf")
    # The largest ratio of probabilities that is asked here, so that the full posterior stays inside fp32.
    observed = (1 + alpha / at_input.clamp_min(1e-12)).log()
    if is_full:
        logits = logits.scatter_add(1, z[:, None], observed[:, None]).float().double()
    term = KlIs(targets, z, alpha, word, at_input, observed if is_full else None)
    rows = logits[:, :4].float().requires_grad_()
    (found,) = linear_row_terms(rows, torch.cat([torch.eye(4), torch.zeros((1, 4))]), [term], oracle.one_rank(9, excluded=MASK))
    (gradient,) = torch.autograd.grad(found, rows, torch.ones_like(found))
    wide = logits.requires_grad_()
    wanted = row_terms.dense_term(term, wide)
    (of_wide,) = torch.autograd.grad(wanted, wide, torch.ones_like(wanted))
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=2e-5, atol=1e-6)
    errors = (gradient - of_wide[:, :4]).abs().amax(dim=1)
    assert (errors <= 1e-6 + 2e-5 * of_wide[:, :4].abs().amax(dim=1)).all()
