"""The weights and densities of the bounds of processes against golden values, and against identities between processes."""

import itertools
import math

import pytest
import torch

from tests.diffusion.test_process import IDS, MASK, NUM_IDS, a_process
from w1train.diffusion.gaussian_argmax import argmax_noising_probability, noising_probability_at
from w1train.diffusion.process import NoiseProcess

PREDICTION = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
CLEAN, WRONG = 1, 0
# The density of the bound at t = 0.1, 0.5 and 0.9, where noise shows the clean token, another word and the mask token.
GOLDEN = {
    "masked": ({}, {MASK: (12.039728, 2.407946, 1.337748)}),
    "masked, cosine": ({"noise_schedule": "cosine"}, {MASK: (11.940542, 1.891196, 0.299536)}),
    "uniform": ({"objective": "uniform"}, {CLEAN: (0.567798, 0.583911, 0.346303), WRONG: (29.969951, 2.473074, 0.286192)}),
    "hybrid 0.1": (
        {"objective": "hybrid", "uniform_share": 0.1},
        {CLEAN: (0.193729, 0.134840, 0.512019), WRONG: (16.915939, 3.252914, 3.218486), MASK: (9.807459, 1.601487, 0.682604)},
    ),
    "hybrid 0.2": (
        {"objective": "hybrid", "uniform_share": 0.2},
        {CLEAN: (0.370796, 0.213943, 0.553473), WRONG: (12.165216, 1.924625, 1.386442), MASK: (8.161614, 1.156532, 0.441685)},
    ),
    "log-SNR": (
        {"objective": "log_snr"},
        {CLEAN: (0.467178, 0.230006, 0.111073), WRONG: (28.022441, 2.069192, 0.488749), MASK: (19.215486, 2.168497, 0.711618)},
    ),
}


def density(process: NoiseProcess, t: float, shown: int) -> float:
    """Return bound_weight (KL(q(. | x) || q(. | prediction)) + rho - log rho - 1) from whole distributions."""
    time = torch.tensor(t, dtype=torch.float64)
    noise = process.noise(time, IDS)
    true = process.alpha(time) * (IDS == CLEAN) + noise
    predicted = process.alpha(time) * PREDICTION + noise
    kl = torch.special.xlogy(true, true).sum() - torch.special.xlogy(true, predicted).sum()
    rho = true[shown] / predicted[shown]
    weight = process.bound_weight(time, torch.tensor(shown), torch.tensor(CLEAN))
    return float(weight * (kl + rho - rho.log() - 1))


@pytest.mark.parametrize("name", GOLDEN)
def test_the_density_of_the_bound(name):
    fields, expected = GOLDEN[name]
    process = a_process(**fields)
    for shown, densities in expected.items():
        assert [density(process, t, shown) for t in (0.1, 0.5, 0.9)] == pytest.approx(densities, abs=6e-7)


def test_the_weights_of_hybrid_noise():
    """The published closed forms at p_u = 0.2: 1 / (t (1 - t)) for masks, half of it for other words."""
    process = a_process(objective="hybrid", uniform_share=0.2)
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    golden = {CLEAN: (0.222222, 0.222222, 1.515152), WRONG: (5.555556, 2.0, 5.555556), MASK: (11.111111, 4.0, 11.111111)}
    for shown, weights in golden.items():
        found = process.bound_weight(times, torch.tensor(shown), torch.tensor(CLEAN))
        assert found.tolist() == pytest.approx(weights, rel=2e-6)
    # Near the ends, where a difference of the noise and its rate would have lost most digits.
    ends = torch.tensor([1e-9, 1 - 2**-30], dtype=torch.float64)
    torch.testing.assert_close(process.bound_weight(ends, torch.tensor(MASK), torch.tensor(CLEAN)), 1 / (ends * (1 - ends)))
    torch.testing.assert_close(process.bound_weight(ends, torch.tensor(WRONG), torch.tensor(CLEAN)), 0.5 / (ends * (1 - ends)))


@pytest.mark.parametrize(("fields", "expected"), [({}, (1.9, 1.5, 1.1)), ({"log_snr_shift": 1000.0}, None)])
def test_the_weights_of_the_log_snr_mixture(fields, expected):
    """The weight times alpha (1 - alpha), per unit of the log-SNR, has published values, and without masks those of uniform noise."""
    process, times = a_process(objective="log_snr", **fields), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    shown = torch.tensor([CLEAN, WRONG, MASK])
    found = process.bound_weight(times[:, None], shown, torch.tensor(CLEAN)) * (times * (1 - times))[:, None]
    if expected is None:
        uniform = a_process(objective="uniform").bound_weight(times[:, None], shown[:2], torch.tensor(CLEAN))
        torch.testing.assert_close(found[:, :2] / (times * (1 - times))[:, None], uniform)
    else:
        golden = [[0.021951, 0.9, 1.9], [0.055556, 0.5, 1.5], [0.018367, 0.1, 1.1]]
        torch.testing.assert_close(found, torch.tensor(golden, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_log_snr_stays_between_minus_9_and_9():
    """Nothing changes beyond these ends, so the bound gets nothing from there."""
    process, times = a_process(objective="log_snr"), torch.tensor([0.0, 1e-5, 1 - 1e-5, 1.0], dtype=torch.float64)
    assert torch.logit(process.alpha(times)).tolist() == pytest.approx([9, 9, -9, -9])
    assert not process.alpha_rate(times).any()
    assert not process.bound_weight(times, torch.tensor(MASK), torch.tensor(CLEAN)).any()


@pytest.mark.parametrize("fields", [{"objective": "hybrid", "uniform_share": 1e-9}, {"objective": "log_snr", "log_snr_shift": -1000.0}])
def test_without_uniform_noise_the_bound_is_that_of_masks(fields):
    process, masked = a_process(**fields), a_process()
    for t in (0.1, 0.5, 0.9):
        assert density(process, t, MASK) == pytest.approx(density(masked, t, MASK), rel=1e-6)
        assert density(process, t, CLEAN) == pytest.approx(0, abs=1e-6)


def test_masked_noise_weighs_the_cross_entropy_as_before():
    """The KL of a mask is alpha times its cross-entropy, in every schedule."""
    for schedule in ("linear", "cosine", "polynomial"):
        process = a_process(noise_schedule=schedule)
        for t in (0.1, 0.5, 0.9):
            weight = process.elbo_weight(torch.tensor(t, dtype=torch.float64))
            assert density(process, t, MASK) == pytest.approx(float(weight) * -math.log(PREDICTION[CLEAN]))


@pytest.mark.parametrize("fields", [fields for fields, _ in GOLDEN.values()], ids=GOLDEN)
def test_with_exact_posteriors_the_bound_is_the_entropy(fields):
    """For one token and a prediction that knows the data's distribution, the integral over t between the ends, with reconstruction and
    prior, is the entropy of the data. Masks and other words are summed up, so no random number is drawn."""
    process, data = a_process(**fields), PREDICTION
    fractions = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    times, rate = process.quadrature(fractions)
    first, last = process.quadrature(torch.tensor([0.0, 1.0], dtype=torch.float64))[0].clamp(1e-9, 1 - 1e-9)
    noise = process.noise(times[:, None], IDS)
    now = process.alpha(times)[:, None] * data + noise
    total = torch.zeros((), dtype=torch.float64)
    for clean, shown in itertools.product(range(NUM_IDS - 1), range(NUM_IDS)):
        true = process.alpha(times)[:, None] * (clean == IDS) + noise
        kl = (torch.special.xlogy(true, true) - torch.special.xlogy(true, now)).sum(dim=1)
        rho = true[:, shown] / now[:, shown]
        jumps = process.jump_rate(times, torch.tensor(shown))
        total += data[clean] * (torch.where(jumps > 0, jumps * (kl + rho - rho.log() - 1), 0.0) * rate).mean()
    for clean in range(NUM_IDS - 1):
        start = process.alpha(first) * (clean == IDS) + process.noise(first, IDS)
        marginal = process.alpha(first) * data + process.noise(first, IDS)
        prediction = start * data[clean] / marginal.clamp_min(1e-300)  # uniform noise is never on the mask token
        total -= data[clean] * torch.special.xlogy(start, prediction).sum()
        end = process.alpha(last) * (clean == IDS) + process.noise(last, IDS)
        prior = process.alpha(last) * data + process.noise(last, IDS)
        total += data[clean] * (torch.special.xlogy(end, end) - torch.special.xlogy(end, prior)).sum()
    assert float(total) == pytest.approx(-float(torch.special.xlogy(data, data).sum()), rel=1e-4)


def test_the_schedule_of_a_gaussian_argmax():
    """Published values at gamma = -1, the closed form for two ids, and the table against the integral."""
    minus_one = torch.tensor([-1.0], dtype=torch.float64)
    assert 1 - float(noising_probability_at(27, minus_one)[0]) == pytest.approx(0.36191281, abs=1e-8)
    assert 1 - float(noising_probability_at(2, minus_one)[0]) == pytest.approx(math.erf(math.exp(0.5) / 2), abs=1e-10)
    times = torch.tensor([0.0, 0.123456789, 0.77777, 1.0], dtype=torch.float64)
    value, rate = noising_probability_at(50_257, -3.55 + 1.7 * times)
    found = argmax_noising_probability(50_257, -3.55, -1.85, times)
    torch.testing.assert_close(found[0], value, rtol=0, atol=1e-13)
    torch.testing.assert_close(found[1], rate * 1.7, rtol=0, atol=1e-8)
