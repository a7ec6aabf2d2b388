"""Bounds on a table of texts, by enumeration in float64: exact predictions give the entropy, other predictions more, and losses that are
published under different names are one number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.objectives.tabular import (
    ENTROPY,
    MASK,
    NOISY,
    NUM_WORDS,
    PROBABILITIES,
    TEXTS,
    all_rows,
    exact_predictions,
    negative_elbo,
    row_values,
    tabular_config,
)
from tests.tiny import tiny_config
from w1train.config.schema import DiffusionConfig
from w1train.diffusion.prediction import evidence, full_from_leave_one_out, leave_one_out_from_full
from w1train.diffusion.processes import noise_process
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.losses import LOSSES, bound_of, loss_of

CONTINUOUS = {
    "masked": ({}, 1e-9),
    "masked cosine": ({"noise_schedule": "cosine"}, 1e-3),
    # MD4's schedule keeps 1e-4 of the text at t = 1, for which the prior pays.
    "masked scaled": ({"schedule_epsilon": 1e-4}, 1e-3),
    "uniform": ({"objective": "uniform"}, 1e-3),
    "uniform geometric": ({"objective": "uniform", "noise_schedule": "geometric", "schedule_sigma_max": 8.0}, 1e-3),
    "hybrid .1": ({"objective": "hybrid"}, 1e-3),
    "hybrid .2": ({"objective": "hybrid", "uniform_share": 0.2}, 1e-3),
    "log_snr": ({"objective": "log_snr"}, 1e-3),
    "token_to_token": ({"objective": "token_to_token"}, 1e-3),
}
each_process = pytest.mark.parametrize(("given", "error"), CONTINUOUS.values(), ids=CONTINUOUS)


def _random_predictions(seed: int = 0) -> torch.Tensor:
    return torch.randn((len(NOISY), 2, NUM_WORDS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(dim=2)


@each_process
def test_exact_predictions_give_the_entropy(given, error):
    """The whole bound, with its end terms."""
    config = tabular_config(**given)
    process = noise_process(config)
    found = negative_elbo(config, lambda t: exact_predictions(process, t, full=False), 40)
    assert ENTROPY - 1e-9 <= found == pytest.approx(ENTROPY, rel=error)


@pytest.mark.parametrize("given", [{}, {"objective": "hybrid", "uniform_share": 0.2}], ids=str)
def test_the_bound_is_that_of_the_process_where_the_reconstruction_is_trained(given):
    """The mean over t of the reconstruction is far below the entropy of the text."""
    config = tabular_config(loss="reconstruction", weight="constant", **given)
    predict = lambda t: exact_predictions(noise_process(config), t, full=False)  # noqa: E731
    assert negative_elbo(config, predict, 30) == pytest.approx(ENTROPY, rel=2e-3)


def test_masks_by_information_have_their_own_bound(tmp_path):
    """A mask says something about its token here. The posterior that knows this gives the entropy, and another prediction more."""
    np.save(tmp_path / "counts.npy", np.array([3, 2, 1, 0]))
    config = tabular_config(objective="per_id_masked", loss="per_id", token_counts=str(tmp_path / "counts.npy"))
    process = noise_process(config)
    found = negative_elbo(config, lambda t: exact_predictions(process, t, full=True), 100)
    assert found == pytest.approx(ENTROPY, rel=1e-3)
    assert negative_elbo(config, lambda t: exact_predictions(process, t, full=False), 100) > 1.005 * found


@each_process
def test_full_predictions_are_converted(given, error):
    """Full predictions give the entropy as well, and without the conversion much more."""
    process = noise_process(tabular_config(**given))
    predict = lambda t: exact_predictions(process, t, full=True)  # noqa: E731
    assert negative_elbo(tabular_config(prediction="full", **given), predict, 30) == pytest.approx(ENTROPY, rel=max(error, 2e-3))
    unconverted = negative_elbo(tabular_config(**given), predict, 20)
    assert (unconverted > 1.2 * ENTROPY) == process.predicts_every_token


@each_process
def test_the_map_between_predictions_is_bayes_rule(given, error):
    process = noise_process(tabular_config(**given))
    for t in (0.05, 0.5, 0.9):
        time = torch.tensor(t, dtype=torch.float64)
        # Noisy texts that the process can make. If noise cannot put a word in the place of another, its evidence has no bound.
        ids, is_possible = NOISY.flatten(), (process.noise(time, NOISY) > 0).all(dim=1).repeat_interleave(2)
        ids = ids[is_possible]
        left, full = (exact_predictions(process, t, full=full).flatten(0, 1)[is_possible] for full in (False, True))
        # The logit of the mask is -inf.
        logits = torch.cat([left.log(), torch.full_like(left[:, :1], -torch.inf)], dim=1)
        found = full_from_leave_one_out(logits, ids, evidence(process, time, ids))
        torch.testing.assert_close(found.softmax(1)[:, :NUM_WORDS], full, rtol=1e-10, atol=0)
        back = leave_one_out_from_full(found, ids, evidence(process, time, ids))
        torch.testing.assert_close(back.softmax(1)[:, :NUM_WORDS], left, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["masked", "uniform", "hybrid .2", "log_snr"])
@pytest.mark.parametrize("num_timesteps", [1, 3])
def test_the_bound_of_steps_bounds_the_likelihood_of_their_chain(name, num_timesteps):
    """The likelihood is the sum over all chains of noisy texts that end in the text; with exact predictions, T = 1 gives the prior."""
    config = tabular_config(loss="finite_kl", num_timesteps=num_timesteps, **CONTINUOUS[name][0])
    process, predictions = noise_process(config), _random_predictions()
    likelihood = _chain_likelihood(process, predictions, num_timesteps)
    cross_entropy = -(PROBABILITIES * likelihood.log()).sum().item()
    found = negative_elbo(config, lambda t: predictions, num_timesteps)
    # The prior of the chain is the noise at t = 1, and that of the bound has the same divergence from it in these processes.
    assert cross_entropy <= found + 1e-9
    assert found < 3 * cross_entropy


def _chain_likelihood(process, predictions: torch.Tensor, num_timesteps: int) -> torch.Tensor:
    """Return the probability of each text, [9], that T steps of the reverse kernel give it from the noise at t = 1."""
    words = torch.cat([predictions, torch.zeros(len(NOISY), 2, 1, dtype=torch.float64)], dim=2)
    last = torch.tensor([1.0], dtype=torch.float64)
    uniform = process.alpha(last) / NUM_WORDS * (torch.arange(NUM_WORDS + 1) < NUM_WORDS)
    of_token = uniform + process.noise(last, torch.arange(NUM_WORDS + 1))
    probability = of_token[NOISY[:, 0]] * of_token[NOISY[:, 1]]
    for step in range(num_timesteps, 0, -1):
        now = torch.full((len(NOISY),), step / num_timesteps, dtype=torch.float64)
        before = torch.full_like(now, (step - 1) / num_timesteps)
        first, second = (process.reverse_probabilities(NOISY[:, place], words[:, place], now, before).nan_to_num() for place in (0, 1))
        reached = probability > 0
        kernel = first[:, NOISY[:, 0]] * second[:, NOISY[:, 1]]
        probability = (probability[:, None] * kernel)[reached].sum(dim=0)
    return probability[TEXTS[:, 0] * (NUM_WORDS + 1) + TEXTS[:, 1]]


def _densities(t: float, **given: object) -> torch.Tensor:
    """Return the density of the bound at each row, with a random prediction, and NaN at rows that the process cannot make."""
    config = tabular_config(**given)
    rows, probability, place = all_rows(noise_process(config), t)
    values = row_values(bound_of(config), rows, _random_predictions().flatten(0, 1)[place])
    return _weighted(config, rows, probability, values)


def _weighted(config: DiffusionConfig, rows: LossRows, probability: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    bound = bound_of(config)
    found = values * bound.elbo_weight(rows.timesteps, rows.inputs, rows.targets)
    found = torch.where(rows.is_noised | torch.tensor(bound.process.predicts_every_token), found, 0.0)
    return torch.where(probability > 0, found, torch.nan)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_bounds_of_masked_noise_are_one_number(t):
    """MDLM = MD4 = SEDD with absorbing noise = GIDD without uniform noise = the steps of D3PM (exactly, at the steps of its grid)."""
    masked = _densities(t)
    assert (masked > 0).sum() > 30
    for other in (_normalised_score(t), _densities(t, loss="finite_kl", num_timesteps=10)):
        torch.testing.assert_close(other, masked, rtol=1e-10, atol=1e-12, equal_nan=True)
    hybrid = _densities(t, objective="hybrid", uniform_share=1e-15)
    possible = masked.isfinite()
    torch.testing.assert_close(hybrid[possible], masked[possible], rtol=1e-10, atol=1e-12)


def _normalised_score(t: float, **given: object) -> torch.Tensor:
    """Return the density of score entropy for outputs that are the scores of a normalised prediction."""
    config = tabular_config(loss="score_entropy", **given)
    process = noise_process(config)
    rows, probability, place = all_rows(process, t)
    predictions = _random_predictions().flatten(0, 1)[place]
    if process.predicts_every_token:
        noised = process.alpha(rows.timesteps)[:, None] * predictions + process.word_noise(rows.timesteps)[:, None]
        outputs = noised / noised.gather(1, rows.inputs.clamp_max(NUM_WORDS - 1)[:, None])
    else:
        outputs = NUM_WORDS * predictions
    return _weighted(config, rows, probability, row_values(loss_of(config), rows, outputs))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_bounds_of_uniform_noise_are_one_number(t):
    """UDLM = Duo = SEDD with uniform noise = the log-SNR mixture with b = infinity."""
    uniform = _densities(t, objective="uniform")
    mixed = _densities(t, objective="log_snr", log_snr_shift=1000.0)
    torch.testing.assert_close(mixed, uniform, rtol=1e-10, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(_normalised_score(t, objective="uniform"), uniform, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", ["uniform", "hybrid .2", "log_snr"])
def test_steps_go_to_the_bound_in_continuous_time(name):
    given = CONTINUOUS[name][0]
    exact = _densities(0.5, **given)
    errors = [
        float((_densities(0.5, loss="finite_kl", num_timesteps=num, **given) - exact).nan_to_num().abs().max()) for num in (1000, 100000)
    ]
    assert errors[1] < 0.02 * errors[0] < 0.02 * 0.1


def test_rdms_weights_are_the_elbo():
    """1/(i + 1) at step i of T, times T, is 1/t (RDM, arXiv 2302.05737)."""
    bound = bound_of(tabular_config())
    steps = torch.arange(1, 11, dtype=torch.float64)
    weights = bound.elbo_weight(steps / 10, torch.full((10,), MASK), torch.zeros(10, dtype=torch.int64))
    torch.testing.assert_close(weights, 10 / steps, rtol=1e-12, atol=0)


def test_masked_diffusion_is_the_mean_over_orders_of_autoregression():
    """The bound of two tokens is half of the sum over both orders, if a prediction depends on the visible tokens alone."""
    predictions = _random_predictions()
    found = negative_elbo(tabular_config(), lambda t: predictions, 50)
    nothing = predictions[MASK * 4 + MASK]
    total = 0.0
    for text, probability in zip(TEXTS.tolist(), PROBABILITIES.tolist(), strict=True):
        first_then_second = nothing[0, text[0]].log() + predictions[text[0] * 4 + MASK, 1, text[1]].log()
        second_then_first = nothing[1, text[1]].log() + predictions[MASK * 4 + text[1], 0, text[0]].log()
        total -= probability * float(first_then_second + second_then_first) / 2
    assert found == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize(("positions", "taught"), [("noised", "leave_one_out"), ("all", "full")])
def test_what_a_cross_entropy_teaches(positions, taught):
    """The distribution with the smallest mean cross-entropy is the mean of the targets. At the tokens that noise has replaced it does not
    know the noised token, which was drawn without the text. At all tokens it does."""
    process, t = noise_process(tabular_config(objective="uniform")), 0.6
    rows, probability, place = all_rows(process, t)
    # Noise has replaced the token with this probability, given what it shows.
    kept = process.alpha(torch.tensor(t, dtype=torch.float64)) * (rows.inputs == rows.targets)
    drawn = process.noise(torch.tensor(t, dtype=torch.float64), rows.inputs)
    mass = probability * (drawn / (kept + drawn).clamp_min(1e-30) if positions == "noised" else 1)
    table = torch.zeros((32, NUM_WORDS), dtype=torch.float64).index_put((place, rows.targets), mass, accumulate=True)
    is_word = (NOISY < NUM_WORDS).all(dim=1).repeat_interleave(2)
    best = (table / table.sum(dim=1, keepdim=True))[is_word]
    exact = exact_predictions(process, t, full=taught == "full").flatten(0, 1)[is_word]
    torch.testing.assert_close(best, exact, rtol=1e-10, atol=0)
    run = tiny_config(diffusion={"objective": "uniform", "loss_positions": positions})
    assert LOSSES["cross_entropy"].taught(run) == taught
