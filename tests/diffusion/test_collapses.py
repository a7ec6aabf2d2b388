"""The bounds of the papers, written down plainly from dense matrices, against those of the product: texts of two tokens over three words.

Only ``product_densities`` and ``product_bound`` call the product. Noise is a matrix Q_t (D3PM, arXiv 2107.03006, section 2), a
continuous process a matrix of rates (Campbell et al., arXiv 2205.14987), and a model a table of predictions for each noisy text, which
nothing but the enumeration of all noisy texts evaluates.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from w1train.config.schema import DiffusionConfig
from w1train.model.row_terms import value_of
from w1train.objectives.integral import integral_of, needs_reconstruction, prior_divergence
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.losses import bound_of, loss_of
from w1train.objectives.row_loss import RowLoss

K, MASK = 3, 3
WORDS, IDS = range(K), range(K + 1)
TEXTS, NOISY = list(itertools.product(WORDS, repeat=2)), list(itertools.product(IDS, repeat=2))
LAW = dict(zip(TEXTS, [0.28, 0.03, 0.06, 0.02, 0.2, 0.05, 0.04, 0.1, 0.22], strict=True))
ENTROPY = -sum(p * math.log(p) for p in LAW.values())


def linear(t):
    return 1 - t


def cosine(t):
    return 1 - math.cos(math.pi / 2 * (1 - t))


def masked(alpha):
    """Return alpha and c of noise that is all on the mask (MDLM, MD4)."""
    return lambda t: (alpha(t), np.array([0, 0, 0, 1 - alpha(t)]))


def uniform(alpha):
    """Return alpha and c of noise that is on every word alike (D3PM's uniform matrix, UDLM, Duo)."""
    return lambda t: (alpha(t), np.array([1, 1, 1, 0]) * (1 - alpha(t)) / K)


def gidd(share):
    """GIDD's hybrid noise with gamma = 1 (arXiv 2503.04482, section 3.2)."""

    def noise(t):
        c = 2 * share / (1 - share) * math.sqrt(t * (1 - t))
        return (1 - t) / (1 + c), np.array([c / K, c / K, c / K, t]) / (1 + c)

    return noise


def log_snr(t):
    """The mixture sigmoid(lambda) of uniform noise, with lambda = log((1 - t) / t) between -9 and 9 (arXiv 2512.10858, a = 1, b = 0)."""
    end = 1 / (1 + math.exp(9))
    t = min(max(t, end), 1 - end)
    return 1 - t, t * np.array([(1 - t) / K, (1 - t) / K, (1 - t) / K, t])


PROCESSES = {
    "masked linear": (masked(linear), {}),
    "masked cosine": (masked(cosine), {"noise_schedule": "cosine"}),
    "uniform linear": (uniform(linear), {"objective": "uniform"}),
    "uniform cosine": (uniform(cosine), {"objective": "uniform", "noise_schedule": "cosine"}),
    "hybrid .1": (gidd(0.1), {"objective": "hybrid"}),
    "hybrid .2": (gidd(0.2), {"objective": "hybrid", "uniform_share": 0.2}),
    "log-SNR": (log_snr, {"objective": "log_snr"}),
}
WITH_CLEAN_END = {name: case for name, case in PROCESSES.items() if name != "log-SNR"}
each_process = pytest.mark.parametrize(("noise", "given"), PROCESSES.values(), ids=PROCESSES)


def config_of(**given) -> DiffusionConfig:
    loss = {"uniform": "kl_is", "hybrid": "kl_is", "log_snr": "kl_is"}.get(given.get("objective", ""), "cross_entropy")
    return DiffusionConfig(mask_token_id=MASK, num_noise_ids=K, **{"loss": loss, **given})


def matrix(noise, t) -> np.ndarray:
    """Return the matrix Q[x, z] = q_t(z | x). A noise gives alpha and c, or the whole matrix."""
    given = noise(t)
    if isinstance(given, np.ndarray):
        return given
    alpha, c = given
    return alpha * np.eye(K + 1) + c


def step(noise, s, t) -> np.ndarray:
    """The matrix of one step, from q_t = q_s q_(t|s), by a linear solve."""
    return np.linalg.solve(matrix(noise, s), matrix(noise, t))


def predictions(seed: int) -> np.ndarray:
    """A model: x-hat [position, first noisy id, second, word], which leaves out nothing, drawn at random."""
    weights = np.exp(1.5 * np.random.default_rng(seed).standard_normal((2, K + 1, K + 1, K)))
    return weights / weights.sum(-1, keepdims=True)


def exact(noise, t, *, full=False) -> np.ndarray:
    """Return p(x_i | z_j), j != i, the prediction that the plug-in bound wants, or (full) p(x_i | z), by Bayes' rule over the texts."""
    found = np.zeros((2, K + 1, K + 1, K))
    q = matrix(noise, t)
    for first, second in NOISY:
        for (x, y), p in LAW.items():
            found[0, first, second, x] += p * q[y, second] * (q[x, first] if full else 1)
            found[1, first, second, y] += p * q[x, first] * (q[y, second] if full else 1)
    return found / np.maximum(found.sum(-1, keepdims=True), 1e-300)


# A row for each text, noisy text and position.
ROWS = [(text, noisy, place) for text in TEXTS for noisy in NOISY for place in (0, 1)]
X, Z = (np.array([row[kind][row[2]] for row in ROWS]) for kind in (0, 1))


def of_rows(model) -> np.ndarray:
    """The prediction of each row, from a table [position, first noisy id, second, word]."""
    return np.array([model[place][noisy] for _, noisy, place in ROWS])


def probabilities(noise, t) -> np.ndarray:
    """Return q_t(z | x) of both tokens of each row."""
    q = matrix(noise, t)
    return np.array([q[x, first] * q[y, second] for (x, y), (first, second), _ in ROWS])


def product_densities(loss: RowLoss, t: float, x, z, predicted) -> np.ndarray:
    """The product's bound density at rows. The prediction has the probability 0 at the mask, and rows without a loss have the density 0."""
    logits = torch.tensor(np.concatenate([np.log(predicted), np.full((len(x), 1), -math.inf)], axis=1))
    targets, inputs, times = torch.tensor(x), torch.tensor(z), torch.full((len(x),), t, dtype=torch.float64)
    is_noised = torch.tensor((z == MASK) | loss.process.predicts_every_token)
    rows = LossRows(targets, inputs, is_noised, times, torch.ones(len(x)), torch.tensor(1), torch.tensor(1), None)
    value = loss.value({name: value_of(term, logits) for name, term in loss.row_terms(rows).items()}, rows)
    return torch.where(is_noised, value * loss.elbo_weight(times, inputs, targets), 0.0).numpy()


def product_density(loss: RowLoss, t: float, x: int, z: int, predicted: np.ndarray) -> float:
    return product_densities(loss, t, np.array([x]), np.array([z]), predicted[None]).item()


def rates(noise, t) -> np.ndarray:
    """The generator R of the noise at t, from the derivative Q' = Q R by a central difference."""
    h = 1e-4 * t * (1 - t)
    return np.linalg.solve(matrix(noise, t), matrix(noise, t + h) - matrix(noise, t - h)) / (2 * h)


def campbell_density(noise, t, x, z, predicted) -> float:
    """The density of the continuous bound: the reverse process jumps from z to y with the rate R[y, z] q(y) / q(z), and a Poisson process
    of the true rate a under the model's rate b costs a log(a / b) - a + b."""
    q, jumps = matrix(noise, t), rates(noise, t)
    of_model = predicted @ q[:K]
    total = 0.0
    for y in IDS:
        if y == z:
            continue
        true, model = (jumps[y, z] * law[y] / law[z] for law in (q[x], of_model))
        total += model - true + (true * math.log(true / model) if true > 1e-14 else 0.0)
    return total


@each_process
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_density_is_the_cost_of_the_reverse_jumps(noise, given, t):
    """Both agree for every text token, noisy token and prediction."""
    loss = bound_of(config_of(**given))
    for seed, x, z in itertools.product(range(3), WORDS, IDS):
        if matrix(noise, t)[x, z] > 0:
            predicted = predictions(seed)[0, z, x]
            if z != MASK and not loss.process.predicts_every_token:
                continue
            expected = campbell_density(noise, t, x, z, predicted)
            assert product_density(loss, t, x, z, predicted) == pytest.approx(expected, rel=1e-5, abs=1e-7), (seed, x, z)


def udlm(alpha, slope, x, z, predicted) -> float:
    """UDLM's loss (arXiv 2412.10193, equation 18)."""
    of_text = K * alpha * np.eye(K)[x] + 1 - alpha
    of_model = K * alpha * predicted + 1 - alpha
    logs = of_text / of_text[z] * np.log(of_model[z] * of_text / (of_model * of_text[z]))
    return slope / (K * alpha) * (K / of_text[z] - K / of_model[z] - logs.sum())


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_uniform_density_is_that_of_udlm(t):
    loss = bound_of(config_of(objective="uniform"))
    for x, z in itertools.product(WORDS, WORDS):
        predicted = predictions(4)[0, z, x]
        assert product_density(loss, t, x, z, predicted) == pytest.approx(udlm(1 - t, -1.0, x, z, predicted), rel=1e-10)


def d3pm_term(noise, s, t, x, z, predicted) -> float:
    """Return KL(q(z_s | z, x) || p(z_s | z)) from the matrices (D3PM, equation 3), where p has the prediction in the place of x."""
    one_step, before = step(noise, s, t), matrix(noise, s)
    true = one_step[:, z] * before[x]
    model = one_step[:, z] * (predicted @ before[:K])
    true, model = true / true.sum(), model / model.sum()
    return sum(a * math.log(a / b) for a, b in zip(true, model, strict=True) if a > 1e-15)


@each_process
@pytest.mark.parametrize("num_steps", [1, 4])
def test_finite_kl_is_the_term_of_d3pm(noise, given, num_steps):
    loss = loss_of(config_of(**{**given, "loss": "finite_kl", "num_timesteps": num_steps}))
    for number, x, z in itertools.product(range(1, num_steps + 1), WORDS, IDS):
        s, t = (number - 1) / num_steps, number / num_steps
        if matrix(noise, t)[x, z] < 1e-12 or (z != MASK and not loss.process.predicts_every_token):
            continue
        predicted = predictions(5)[0, z, x]
        found = product_density(loss, t, x, z, predicted) / num_steps
        assert found == pytest.approx(d3pm_term(noise, s, t, x, z, predicted), rel=1e-9, abs=1e-12), (number, x, z)


def mean(noise, t, values) -> float:
    """The mean over texts and noise of the sum over both positions, where noise can make the row."""
    weights = probabilities(noise, t) * [LAW[text] for text, _, _ in ROWS]
    return float((weights * np.where(weights > 0, values, 0.0)).sum())


def product_bound(noise, given, model_at, num_points=48) -> float:
    """The whole bound of the product by its own quadrature (at Gauss points of u), with its end terms."""
    config = config_of(**given)
    loss = bound_of(config)
    points, weights = np.polynomial.legendre.leggauss(num_points)
    integral = integral_of(config, ((points + 1) / 2).tolist())
    total = 2 * prior_divergence(loss.process, integral.last, K, MASK)
    for weight, rate, t in zip(weights, integral.rates, integral.timesteps, strict=True):
        total += weight / 2 * rate * mean(noise, t, product_densities(loss, t, X, Z, of_rows(model_at(t))))
    if needs_reconstruction(loss.process, integral.first):
        total += mean(noise, integral.first, reconstruction(noise, integral.first, of_rows(model_at(integral.first))))
    return total


def reconstruction(noise, t, predicted) -> np.ndarray:
    """Return -log p(x | z) by Bayes' rule."""
    posterior = matrix(noise, t)[:K, Z].T * predicted
    return -np.log(posterior[np.arange(len(X)), X] / posterior.sum(1))


@each_process
def test_exact_posteriors_give_the_entropy(noise, given):
    found = product_bound(noise, given, lambda t: exact(noise, t))
    assert ENTROPY - 1e-9 <= found == pytest.approx(ENTROPY, abs=2e-3)


def chain_likelihood(noise, model, num_steps: int) -> np.ndarray:
    """Return -log p(x) of each text under the chain of the model, which begins with the noise of tokens drawn from all words alike."""
    first_law = matrix(noise, 1.0)[:K].mean(0)
    law = np.outer(first_law, first_law)
    for number in range(num_steps, 0, -1):
        s, t = (number - 1) / num_steps, number / num_steps
        one_step, before = step(noise, s, t), matrix(noise, s)[:K]
        following = np.zeros_like(law)
        for noisy in NOISY:
            kernels = [model[place][noisy] @ before * one_step[:, noisy[place]] for place in (0, 1)]
            if law[noisy] > 0:
                following += law[noisy] * np.outer(*(kernel / kernel.sum() for kernel in kernels))
        law = following
    return -np.log([law[text] for text in TEXTS])


@pytest.mark.parametrize(("noise", "given"), WITH_CLEAN_END.values(), ids=WITH_CLEAN_END)
def test_bound_is_above_the_likelihood_of_the_chain(noise, given):
    """A model that is not exact, in 6 steps: the product's sum over the steps, text by text."""
    num_steps, model = 6, predictions(7)
    loss = loss_of(config_of(**{**given, "loss": "finite_kl", "num_timesteps": num_steps}))
    likelihood = chain_likelihood(noise, model, num_steps)
    bounds = np.zeros(len(TEXTS))
    for number in range(1, num_steps + 1):
        t = number / num_steps
        terms = probabilities(noise, t) * product_densities(loss, t, X, Z, of_rows(model)) / num_steps
        bounds += np.nan_to_num(terms).reshape(len(TEXTS), -1).sum(1)
    assert (bounds >= likelihood - 1e-9).all(), (bounds, likelihood)
    assert (bounds < 3 * likelihood).all()


@pytest.mark.parametrize("name", ["masked cosine", "uniform linear", "hybrid .2"])
def test_steps_of_d3pm_tend_to_the_continuous_density(name):
    """The term of a step, times T, has an error of order 1 / T."""
    noise, given = PROCESSES[name]
    loss, t = bound_of(config_of(**given)), 0.5
    for x, z in ((0, MASK), (1, 0), (2, 2)):
        if matrix(noise, t)[x, z] == 0 or (z != MASK and not loss.process.predicts_every_token):
            continue
        predicted = predictions(8)[0, z, x]
        expected = product_density(loss, t, x, z, predicted)
        errors = [abs(num * d3pm_term(noise, t - 1 / num, t, x, z, predicted) - expected) for num in (1000, 2000)]
        assert errors[1] < 0.01 * expected
        assert errors[1] == pytest.approx(errors[0] / 2, rel=0.05)


def test_masked_bound_is_the_mean_over_orders_of_autoregression():
    """A model that sees only the visible tokens has a likelihood for each order of them (arXiv 2110.02037)."""
    model = predictions(9)
    expected = 0.0
    for (x, y), p in LAW.items():
        first_then_second = model[0, MASK, MASK, x] * model[1, x, MASK, y]
        second_then_first = model[1, MASK, MASK, y] * model[0, MASK, y, x]
        expected -= p * (math.log(first_then_second) + math.log(second_then_first)) / 2
    for name in ("masked linear", "masked cosine"):
        noise, given = PROCESSES[name]
        assert product_bound(noise, given, lambda t: model) == pytest.approx(expected, rel=1e-6 if "linear" in name else 1e-3)


@pytest.mark.parametrize("t", [0.3, 0.7])
def test_score_entropy_of_a_normalised_score_is_the_same_density(t):
    """SEDD (arXiv 2310.16834, definition 3.1) under uniform noise, whose outputs are the logarithms of q(y | x-hat) / q(z | x-hat)."""
    noise, given = PROCESSES["uniform linear"]
    score, bound = loss_of(config_of(**{**given, "loss": "score_entropy"})), bound_of(config_of(**given))
    q = matrix(noise, t)
    for x, z in itertools.product(WORDS, WORDS):
        predicted = predictions(10)[0, z, x]
        outputs = predicted @ q[:K, :K]
        found = product_density(score, t, x, z, outputs / outputs[z])
        assert found == pytest.approx(product_density(bound, t, x, z, predicted), rel=1e-10)


def per_id_case(tmp_path):
    """DiffusionBERT's spindle (arXiv 2211.15029) from counts of the words and of a fourth id, and the product's fields of it."""
    counts = np.array([40, 30, 20, 10])
    np.save(tmp_path / "counts.npy", counts)
    information = -np.log(counts / counts.sum())
    relative = 1 - information.mean() / information

    def noise(t):
        masks = np.append((t + 0.3 * np.sin(math.pi * t) * relative)[:K], 1.0)
        return np.diag(1 - masks) + np.outer(masks, np.eye(K + 1)[MASK])

    return noise, {"objective": "per_id_masked", "loss": "per_id", "token_counts": tmp_path / "counts.npy", "spindle_scale": 0.3}


def test_per_id_density_is_the_cost_of_the_reverse_jumps(tmp_path):
    """From a mask the process jumps to v with the rate of v times the prediction (MD4, arXiv 2406.04329, section 6)."""
    noise, given = per_id_case(tmp_path)
    loss, t, h = bound_of(config_of(**given)), 0.6, 1e-5
    masks, more, less = (np.diag(np.eye(K) - matrix(noise, time)[:K, :K]) for time in (t, t + h, t - h))
    slopes = (more - less) / (2 * h) / masks
    for x in WORDS:
        predicted = predictions(11)[0, MASK, x]
        model = slopes * predicted
        expected = model.sum() - slopes[x] + slopes[x] * math.log(slopes[x] / model[x])
        assert product_density(loss, t, x, MASK, predicted) == pytest.approx(expected, rel=1e-6)


def test_per_id_bound_is_the_entropy_at_best_and_above_the_likelihood(tmp_path):
    """The likelihood is that of 300 steps, in which a mask becomes v with the probability of v times 1 - masks_s(v) / masks_t(v)."""
    noise, given = per_id_case(tmp_path)
    # Here a mask says something about the word below it, so the best prediction knows the mask.
    best = product_bound(noise, given, lambda t: exact(noise, t, full=True))
    assert ENTROPY - 1e-9 <= best == pytest.approx(ENTROPY, abs=1e-6)
    model, num_steps = predictions(12), 300
    law = np.zeros((K + 1, K + 1))
    law[MASK, MASK] = 1.0
    for number in range(num_steps, 0, -1):
        masks, before = (np.diag(np.eye(K) - matrix(noise, n / num_steps)[:K, :K]) for n in (number, number - 1))
        following = np.zeros_like(law)
        for noisy in NOISY:
            kernels = [np.eye(K + 1)[z] for z in noisy]
            for place in (0, 1):
                if noisy[place] == MASK:
                    to_words = model[place][noisy] * (1 - before / masks)
                    kernels[place] = np.append(to_words, 1 - to_words.sum())
            following += law[noisy] * np.outer(*kernels)
        law = following
    likelihood = -sum(p * math.log(law[text]) for text, p in LAW.items())
    found = product_bound(noise, given, lambda t: model)
    assert likelihood - 0.01 <= found < 2 * likelihood
