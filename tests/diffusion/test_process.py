"""Noise processes: what each must satisfy, alone and beside the others."""

import pytest
import torch

from tests.tiny import VOCAB_SIZE, packed_batch
from w1train.config.schema import DiffusionConfig
from w1train.diffusion.autoregressive import AutoregressiveProcess
from w1train.diffusion.corruption import corrupt, corrupt_at
from w1train.diffusion.masked import MaskedProcess
from w1train.diffusion.noise_ids import NoiseIds
from w1train.diffusion.process import NoiseProcess
from w1train.diffusion.processes import noise_process
from w1train.diffusion.schedules import Linear
from w1train.diffusion.uniform import UniformProcess

NUM_IDS, MASK = 5, 4
IDS = torch.arange(NUM_IDS)
TIMES = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


def a_process(**fields) -> NoiseProcess:
    """Return a process over four words and the mask token."""
    return noise_process(DiffusionConfig(**{"mask_token_id": MASK, "num_noise_ids": NUM_IDS, **fields}))


NOISY = {
    "masked": a_process(),
    "masked, cosine": a_process(noise_schedule="cosine"),
    "masked, polynomial": a_process(noise_schedule="polynomial", schedule_power=3.0),
    "masked, log-linear": a_process(noise_schedule="log_linear", schedule_epsilon=1e-3),
    "masked, scaled": a_process(noise_schedule="cosine", schedule_epsilon=1e-2),
    "masked, geometric": a_process(noise_schedule="geometric", schedule_sigma_min=1e-2),
    "uniform": a_process(objective="uniform"),
    "uniform with masks": a_process(objective="uniform", exclude_mask_logit=False, noise_schedule="cosine"),
    "uniform, geometric": a_process(objective="uniform", noise_schedule="geometric", schedule_sigma_min=1e-2),
    "uniform, Gaussian": a_process(objective="uniform", noise_schedule="gaussian_argmax"),
    "hybrid": a_process(objective="hybrid", uniform_share=0.2),
    "hybrid, gamma 2": a_process(objective="hybrid", hybrid_gamma=2.0),
    "log-SNR": a_process(objective="log_snr"),
    "log-SNR, shifted": a_process(objective="log_snr", log_snr_slope=0.5, log_snr_shift=-1.0),
    "token-to-token": a_process(objective="token_to_token", noise_schedule="cosine"),
}
PROCESSES_HERE = {**NOISY, "autoregressive": AutoregressiveProcess()}
# The spindle's alpha differs from id to id, so its marginal has a test of its own.

every = pytest.mark.parametrize("process", PROCESSES_HERE.values(), ids=PROCESSES_HERE)
noisy_ones = pytest.mark.parametrize("process", NOISY.values(), ids=NOISY)


def _marginal(process, t):
    """q_t(z | x) as a matrix [x, z], from its definition."""
    t = torch.tensor(t, dtype=torch.float64)
    return process.alpha(t) * torch.eye(NUM_IDS, dtype=torch.float64) + process.noise(t, IDS)


@every
def test_the_marginal_is_a_distribution(process):
    for t in TIMES.tolist():
        marginal = _marginal(process, t)
        assert (marginal >= 0).all()
        torch.testing.assert_close(marginal.sum(dim=1), torch.ones(NUM_IDS, dtype=torch.float64))
    torch.testing.assert_close(process.noising_probability(TIMES), 1 - process.alpha(TIMES))


@every
def test_rates_are_derivatives(process):
    times = TIMES.clone().requires_grad_()
    for value, rate in (
        (process.alpha(times), process.alpha_rate(TIMES)),
        (process.noise(times[:, None], IDS).sum(), process.noise_rate(TIMES[:, None], IDS).sum(dim=1)),
    ):
        (slope,) = torch.autograd.grad(value.sum(), times, allow_unused=True) if value.requires_grad else (torch.zeros_like(TIMES),)
        torch.testing.assert_close(slope, rate, rtol=1e-6, atol=1e-9)


@noisy_ones
def test_a_step_of_noise_is_a_distribution(process):
    """q(z_t | z_s) has no negative mass: c_t(z) / alpha_t never falls with t."""
    ratio = process.noise(TIMES[:, None], IDS) / process.alpha(TIMES)[:, None]
    assert (ratio.diff(dim=0) >= 0).all()


@noisy_ones
def test_a_timestep_follows_from_its_noising_probability(process):
    torch.testing.assert_close(process.timestep_at(process.noising_probability(TIMES)), TIMES)


@pytest.mark.parametrize(("s", "t"), [(0.1, 0.9), (0.4, 0.6), (0.59, 0.6)])
@noisy_ones
def test_the_reverse_kernel_is_bayes_rule(process, s, t):
    """Against q(z_t | z_s) q_s(z_s | x) / q_t(z_t | x) from matrices, for every x and z_t that it can become; and over both the kernel
    leads from q_t to q_s."""
    _assert_bayes_rule(process, _marginal(process, s), _marginal(process, t), s, t)


def _assert_bayes_rule(process, before, now, s, t):
    step = torch.linalg.solve(before, now)  # [z_s, z_t]: q_t = q_s step
    timesteps, earlier = (torch.full((NUM_IDS,), time, dtype=torch.float64) for time in (t, s))
    for clean in range(NUM_IDS - 1):
        predictions = torch.nn.functional.one_hot(torch.full((NUM_IDS,), clean), NUM_IDS).double()
        kernel = process.reverse_probabilities(IDS, predictions, timesteps, earlier)  # [z_t, z_s]
        reached = now[clean] > 1e-12
        expected = (step.T * before[clean] / now[clean][:, None])[reached]
        torch.testing.assert_close(kernel[reached], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(now[clean][reached] @ kernel[reached], before[clean], rtol=1e-9, atol=1e-9)


@noisy_ones
def test_the_jump_rate_is_what_a_short_step_of_noise_adds(process):
    """The rate is the limit of (c_t - alpha_t|s c_s) / (t - s) as s goes to t."""
    t, length = torch.tensor(0.4, dtype=torch.float64), 1e-6
    s = t - length
    added = process.noise(t, IDS) - process.alpha(t) / process.alpha(s) * process.noise(s, IDS)
    torch.testing.assert_close(process.jump_rate(t, IDS), added / length, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(process.jump_rate(TIMES[:, None], IDS), NoiseProcess.jump_rate(process, TIMES[:, None], IDS))


@noisy_ones
def test_noise_on_words(process):
    expected = process.noise(TIMES, torch.tensor(0))
    torch.testing.assert_close(process.word_noise(TIMES), expected, rtol=1e-12, atol=0)
    assert process.predicts_every_token == bool((expected > 0).all()) == (process.bound == "kl_is")


@noisy_ones
def test_a_quadrature_covers_the_process(process):
    """dt/du is the derivative of t, and t grows from one end of the process to the other."""
    fractions = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    times, rate = process.quadrature(fractions)
    if rate.requires_grad:
        torch.testing.assert_close(torch.autograd.grad(times.sum(), fractions)[0], rate)
    assert (times.diff() > 0).all()
    assert times[0] < 2e-4
    assert times[-1] > 1 - 2e-4


def test_the_kernel_of_uniform_noise():
    """Computed by hand for linear uniform noise over five ids, from t = 0.6 to 0.4 with z = 1 observed."""
    predictions = torch.tensor([[0.35, 0.25, 0.2, 0.15, 0.05]], dtype=torch.float64)
    times = torch.tensor([0.6], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    found = UniformProcess(NoiseIds(NUM_IDS), Linear()).reverse_probabilities(torch.tensor([1]), predictions, *times)
    expected = torch.tensor([[0.087879, 0.766667, 0.060606, 0.051515, 0.033333]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_kernel_of_hybrid_noise():
    """The step from t = 0.6 to 0.4 of a mask has the published probabilities of GIDD with p_u = 0.2."""
    predictions = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0]], dtype=torch.float64)
    times = torch.tensor([0.6], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    found = NOISY["hybrid"].reverse_probabilities(torch.tensor([MASK]), predictions, *times)
    expected = torch.tensor([[0.134426, 0.107652, 0.080877, 0.054102, 0.622944]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_masked_kernel_is_the_general_one_and_keeps_tokens():
    process = MaskedProcess(MASK)
    predictions = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64).expand(NUM_IDS, -1)
    times = torch.full((NUM_IDS,), 0.6, dtype=torch.float64), torch.full((NUM_IDS,), 0.4, dtype=torch.float64)
    found = process.reverse_probabilities(IDS, predictions, *times)
    torch.testing.assert_close(found, NoiseProcess.reverse_probabilities(process, IDS, predictions, *times))
    certain = torch.nn.functional.one_hot(torch.zeros(NUM_IDS, dtype=torch.long), NUM_IDS).double()
    kept = process.reverse_probabilities(IDS, certain, *times)
    assert torch.equal(kept[:MASK], torch.eye(NUM_IDS, dtype=torch.float64)[:MASK]), "also where the model gives no probability"
    done = process.reverse_probabilities(IDS, predictions, times[0], torch.zeros_like(times[0]))
    assert torch.equal(done[MASK], predictions[MASK]), "at s = 0 no mask is left"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_elbo_weight_of_linear_masking_is_1_over_t_to_the_last_bit(dtype):
    timesteps = torch.rand(100_000, dtype=dtype, generator=torch.Generator().manual_seed(0)).clamp_min(1e-6)
    assert torch.equal(MaskedProcess(MASK).elbo_weight(timesteps), 1.0 / timesteps)
    assert torch.equal(AutoregressiveProcess().elbo_weight(timesteps), torch.ones_like(timesteps))


def test_the_elbo_weight_does_not_depend_on_the_schedule():
    """Over the noising probability p, -alpha' / (1 - alpha) dt is dp / p, whatever alpha (MDLM, arXiv 2406.07524, section 3)."""
    for process in NOISY.values():
        dp = -process.alpha_rate(TIMES)
        torch.testing.assert_close(process.elbo_weight(TIMES) / dp, 1 / process.noising_probability(TIMES))


def test_a_sampler_asks_which_positions_are_noised():
    ids = torch.tensor([[3, MASK, 0], [MASK, MASK, 1]])
    assert torch.equal(MaskedProcess(MASK).is_noised(ids), ids == MASK)
    assert not AutoregressiveProcess().is_noised(ids).any()


def test_the_configuration_chooses():
    assert noise_process(DiffusionConfig(mask_token_id=7)) == MaskedProcess(7)
    assert noise_process(DiffusionConfig(objective="autoregressive")) == AutoregressiveProcess()


@pytest.mark.parametrize("timestep_per", ["sequence", "document"])
def test_the_statistics_of_uniform_noise(timestep_per):
    """What is kept, what replaces the rest, and that t is not the noising probability."""
    config = DiffusionConfig(
        objective="uniform",
        noise_schedule="cosine",
        num_noise_ids=VOCAB_SIZE,
        random_length_probability=0.0,
        num_strata=8,
        timestep_per=timestep_per,
    )
    batch = packed_batch(range(512))
    noisy = corrupt(batch, config, seed=5)
    noised, real = noisy.target_is_noised, batch.document_ids >= 0
    assert torch.equal(noisy.loss_mask, real), "every token has a loss"
    assert torch.equal(noisy.input_ids[~noised], batch.tokens[~noised])
    rate = noise_process(config).noising_probability(noisy.target_timesteps[real].double()).mean()
    assert abs(float(noised[real].double().mean() - rate)) < 0.01
    counts = torch.bincount(noisy.input_ids[noised], minlength=VOCAB_SIZE)
    assert len(counts) == VOCAB_SIZE
    assert counts[config.mask_token_id] == 0
    others = torch.cat([counts[: config.mask_token_id], counts[config.mask_token_id + 1 :]])
    assert others.min() > 0.6 * others.double().mean()
    same = noisy.input_ids[noised] == batch.tokens[noised]
    assert 0 < float(same.double().mean()) < 3 / VOCAB_SIZE, "the replacement does not depend on the token"
    masked = corrupt(batch, DiffusionConfig(random_length_probability=0.0, num_strata=8, timestep_per=timestep_per), seed=5)
    assert torch.equal(masked.target_timesteps, noisy.target_timesteps), "t is drawn alike for every process"
    assert noised[masked.loss_mask].all(), "the first word decides in every process, and here with a larger probability"


def test_at_one_t_every_process_noises_that_share():
    for name in ("diffusion", "autoregressive", "edits", "log_snr"):
        config = DiffusionConfig(objective=name, num_noise_ids=VOCAB_SIZE)
        noisy = corrupt_at(packed_batch(range(1024)), config, seed=0, timestep=0.3, draw=1)
        share = (noisy.input_ids != noisy.tokens)[noisy.document_ids >= 0].double().mean()
        assert float(share) == pytest.approx(0.0 if name == "autoregressive" else 0.3, abs=0.01)
