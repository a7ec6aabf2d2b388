"""The kernels against exact laws on tiny vocabularies, published values, and the invariants of sampling.

Shapes: n = positions or states, v = vocabulary.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.sampling.test_denoise import expect_shares
from tests.sampling.test_threshold import ToyBlocks
from tests.slow import slow_except
from tests.tiny import tiny_config
from w1train.config.errors import UserError
from w1train.config.schema import DiffusionConfig, SamplingConfig
from w1train.diffusion.learned_masked import EPSILON
from w1train.diffusion.prediction import leave_one_out_from_scores
from w1train.diffusion.processes import noise_process
from w1train.registered_names import NAME_RULES
from w1train.sampling.ancestral import Ancestral, Interval
from w1train.sampling.canvas import DenoisingStep
from w1train.sampling.denoise import generate
from w1train.sampling.kernel import Batch
from w1train.sampling.kernels import KERNELS, kernel_name
from w1train.sampling.model_passes import WholeCanvas

NUM_WORDS, MASK = 3, 3
VOCAB_SIZE = NUM_WORDS + 1
PROCESSES = {
    "masked": {"objective": "diffusion"},
    "cosine": {"objective": "diffusion", "noise_schedule": "cosine"},
    "uniform": {"objective": "uniform"},
    "argmax": {"objective": "uniform", "noise_schedule": "geometric", "schedule_sigma_min": 0.01, "schedule_sigma_max": 9.0},
    "hybrid": {"objective": "hybrid", "uniform_share": 0.2},
}
STATES = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=2)))
TABLE = torch.tensor([[0.30, 0.02, 0.08], [0.05, 0.20, 0.05], [0.01, 0.04, 0.25]], dtype=torch.float64)
"""A distribution of texts of two words."""


def diffusion_of(name: str, *, mask: int = MASK, **fields) -> DiffusionConfig:
    return DiffusionConfig(mask_token_id=mask, num_noise_ids=mask, **PROCESSES[name], **fields)


def kernel_of(diffusion: DiffusionConfig, name: str = "ancestral", **settings) -> Ancestral:
    config = SamplingConfig(**{"temperature": 1.0, **settings})
    return KERNELS[name](Batch(config, diffusion, [0], None, "cpu"))


def forward(diffusion: DiffusionConfig, t: float, size: int = VOCAB_SIZE) -> Tensor:
    """Return q_t(z | x), float64 [x, z], over the words x and all ids z."""
    process, time = noise_process(diffusion), torch.tensor(t, dtype=torch.float64)
    return process.alpha(time) * torch.eye(size, dtype=torch.float64)[: size - 1] + process.noise(time, torch.arange(size))


class Table:
    """The exact posteriors of TABLE, as a model."""

    def __init__(self, diffusion: DiffusionConfig, *, full: bool) -> None:
        self.diffusion, self.full = diffusion, full

    def __call__(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        assert timesteps.unique().numel() == 1
        seen = forward(self.diffusion, float(timesteps[0])).T[tokens.T]  # [2, n, x]
        posteriors = torch.stack([seen[1] @ TABLE.T, seen[0] @ TABLE], dim=1)
        if self.full:
            posteriors = posteriors * seen.transpose(0, 1)
        return torch.nn.functional.pad(posteriors, (0, 1)).log()


def law_of(kernel: Ancestral, diffusion: DiffusionConfig, num_steps: int, *, full: bool) -> Tensor:
    """Return the exact probabilities of the texts [3, 3] that a kernel writes with a model that knows the posteriors of TABLE."""
    process, source = kernel.process, WholeCanvas(Table(diffusion, full=full), diffusion)
    prior = process.noise(torch.ones((), dtype=torch.float64), torch.arange(VOCAB_SIZE))
    law = torch.outer(prior, prior).flatten() / prior.sum() ** 2
    everywhere = torch.ones_like(STATES, dtype=torch.bool)
    for step in kernel.plan(2, num_steps):
        reached = law > 0
        states = STATES[reached]
        timesteps = source.timesteps(kernel.noised(everywhere[reached], step), 0, 2)
        logits = source.logits(states, timesteps, 0, 2)
        moves = torch.nn.functional.one_hot(states, VOCAB_SIZE).double()
        changes = process.noise(torch.tensor(step.t, dtype=torch.float64), states) > 0
        moves[changes] = kernel.probabilities(states[changes], logits[changes], step)
        law = torch.einsum("n,na,nb->ab", law[reached], moves[:, 0], moves[:, 1]).flatten()
    return law.reshape(VOCAB_SIZE, VOCAB_SIZE)


LAWS = [(name, kernel) for name in PROCESSES for kernel in ("ancestral", "gidd_posterior")]
LAWS_IN_EACH_RUN = [("cosine", "gidd_posterior"), ("uniform", "ancestral"), ("hybrid", "ancestral")]


@pytest.mark.parametrize("case", slow_except(LAWS_IN_EACH_RUN, LAWS), ids=str)
def test_the_law_of_the_samples_tends_to_that_of_the_data(case):
    """Both predictions give the same law, and its distance from the data falls with the number of steps."""
    (name, kernel), distances = case, []
    for num_steps in (4, 64):
        laws = []
        for prediction in ("leave_one_out", "full"):
            diffusion = diffusion_of(name, prediction=prediction)
            laws.append(law_of(kernel_of(diffusion, kernel), diffusion, num_steps, full=prediction == "full"))
        torch.testing.assert_close(laws[0], laws[1], rtol=0, atol=1e-6)
        assert not laws[0][MASK].any()
        assert not laws[0][:, MASK].any()
        distances.append(float((laws[0][:NUM_WORDS, :NUM_WORDS] - TABLE).abs().sum()))
    assert distances[1] < distances[0] / 8
    assert distances[1] < 0.04


@pytest.mark.parametrize("name", ["uniform", "hybrid"])
def test_a_full_prediction_in_the_place_of_leave_one_out_has_another_law(name):
    diffusion = diffusion_of(name)
    law = law_of(kernel_of(diffusion), diffusion, 64, full=True)
    assert float((law[:NUM_WORDS, :NUM_WORDS] - TABLE).abs().sum()) > 0.05


RATES = torch.tensor([0.4, 1.0, 3.0, 1.0], dtype=torch.float64)


class LearnedRates(Table):
    """The exact posteriors of TABLE where the rates of masks are RATES. A mask says something about its own token too."""

    def __call__(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        masked = (1 - EPSILON) * timesteps[0].double() ** RATES[:NUM_WORDS]
        likelihoods = torch.cat([torch.diag(1 - masked), masked[:, None]], dim=1)
        seen = likelihoods.T[tokens.T]  # [2, n, x]
        posteriors = torch.stack([seen[0] * (seen[1] @ TABLE.T), seen[1] * (seen[0] @ TABLE)], dim=1)
        return torch.nn.functional.pad(posteriors, (0, 1)).log()

    def noise_rates(self) -> Tensor:
        return RATES


def _law_of_rates(rates: Tensor, num_steps: int) -> Tensor:
    diffusion = DiffusionConfig(mask_token_id=MASK, objective="learned_masked")
    kernel = Ancestral(Batch(SamplingConfig(temperature=1.0), diffusion, [0], None, "cpu", rates))
    source, law = WholeCanvas(LearnedRates(diffusion, full=True), diffusion), {(MASK, MASK): 1.0}
    for step in kernel.plan(2, num_steps):
        states = torch.tensor(list(law))
        masked = states == MASK
        timesteps = source.timesteps(kernel.noised(torch.ones_like(masked), step), 0, 2)
        moves = torch.nn.functional.one_hot(states, VOCAB_SIZE).double()
        moves[masked] = kernel.probabilities(states[masked], source.logits(states, timesteps, 0, 2)[masked], step)
        after = torch.einsum("n,na,nb->ab", torch.tensor(list(law.values()), dtype=torch.float64), moves[:, 0], moves[:, 1])
        law = {(a, b): after[a, b].item() for a, b in after.nonzero().tolist()}
    return after


def test_learned_rates_decide_when_a_token_is_written():
    """With the rates of the model the law of the samples tends to that of the data, and with other rates it does not."""
    errors = [float((_law_of_rates(RATES, steps)[:NUM_WORDS, :NUM_WORDS] - TABLE).abs().sum()) for steps in (4, 64)]
    assert errors[1] < errors[0] / 8
    assert errors[1] < 0.02
    assert not _law_of_rates(RATES, 4)[MASK].any()
    assert float((_law_of_rates(torch.ones(VOCAB_SIZE), 64)[:NUM_WORDS, :NUM_WORDS] - TABLE).abs().sum()) > 0.05


def test_a_model_gives_its_learned_rates_to_the_kernel():
    diffusion = DiffusionConfig(mask_token_id=MASK, objective="learned_masked")
    settings = SamplingConfig(temperature=1.0, kernel="ancestral", num_tokens=2, num_steps=4)
    found = generate(LearnedRates(diffusion, full=True), [[]] * 2000, settings, diffusion=diffusion, eos_token_id=99, device="cpu")
    pairs = found.completions @ torch.tensor([NUM_WORDS, 1])
    expect_shares(pairs.bincount(minlength=9).double(), _law_of_rates(RATES, 4)[:NUM_WORDS, :NUM_WORDS].flatten())


class Scores(Table):
    """The exact scores of TABLE: logarithms of q(y | posterior) / q(z | posterior). That of z itself is not trained, so it is wrong."""

    def __call__(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        posteriors = super().__call__(tokens, timesteps)[:, :, :NUM_WORDS].softmax(dim=2)
        laws = posteriors @ forward(self.diffusion, float(timesteps[0]))
        ratios = (laws / laws.gather(2, tokens[:, :, None])).log()
        return ratios.scatter(2, tokens[:, :, None], 3.0).index_fill(2, torch.tensor(MASK), 7.0)


def test_scores_under_uniform_noise_have_the_law_of_their_posteriors():
    uniform = {"objective": "uniform", "loss": "score_entropy"}
    diffusion = DiffusionConfig(mask_token_id=MASK, num_noise_ids=NUM_WORDS, **uniform, noise_schedule="geometric", schedule_sigma_max=9.0)
    source, tokens, t = WholeCanvas(Scores(diffusion, full=False), diffusion), STATES[(STATES != MASK).all(dim=1)], torch.tensor([0.6])
    found = source.logits(tokens, t.expand(len(tokens)), 0, 2).softmax(dim=2)
    expected = Table(diffusion, full=False)(tokens, t).softmax(dim=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_scores_of_no_distribution_are_cut_to_probabilities():
    """A model's scores need not be at least c / (alpha + c)."""
    logits = torch.tensor([[-9.0, 0.7, 1.0, -torch.inf]], dtype=torch.float64)
    alpha, noise = torch.tensor([0.4], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    found = leave_one_out_from_scores(logits, torch.tensor([1]), alpha, noise).exp()[0]
    assert found[0] == found[3] == 0
    assert found.sum().item() == pytest.approx(1)
    assert (found[2] / found[1]).item() == pytest.approx(
        (math.e / (math.e + 1 + math.exp(-9)) - 0.2) / (1 / (math.e + 1 + math.exp(-9)) - 0.2)
    )


@pytest.mark.parametrize("kernel", ["ancestral", "gidd_posterior"])
@pytest.mark.parametrize("name", PROCESSES)
def test_an_oracle_keeps_the_forward_process(name, kernel):
    """sum over z of q_t(z | x) p(z_s | z) = q_s(z_s | x) if the model knows x, and the last step gives x."""
    diffusion, x = diffusion_of(name), 1
    kernel = kernel_of(diffusion, kernel)
    for t, s in ((0.9, 0.4), (0.4, 0.1), (0.3, None)):
        before = forward(diffusion, t)[x]
        ids = before.nonzero()[:, 0]
        logits = torch.where(torch.arange(VOCAB_SIZE) == x, 0.0, -torch.inf).expand(len(ids), -1)
        after = before[ids] @ kernel.probabilities(ids, logits, Interval(t, s))
        expected = forward(diffusion, s)[x] if s is not None else torch.nn.functional.one_hot(torch.tensor(x), VOCAB_SIZE).double()
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-12)


GOLDEN_STEPS = [
    ("uniform", 5, 1, (0.35, 0.25, 0.2, 0.15, 0.05), (0.087879, 0.766667, 0.060606, 0.051515, 0.033333)),
    ("hybrid", 4, 4, (0.4, 0.3, 0.2, 0.1), (0.134426, 0.107652, 0.080877, 0.054102, 0.622944)),
]


@pytest.mark.parametrize(("name", "num_words", "z", "prediction", "expected"), GOLDEN_STEPS)
def test_golden_steps(name, num_words, z, prediction, expected):
    """The steps are those published, once more as the mixture of the posteriors of all clean tokens that the full prediction weighs."""
    diffusion = diffusion_of(name, mask=num_words)
    kernel = kernel_of(diffusion)
    logits = torch.tensor([*prediction, 0.0], dtype=torch.float64).log()[None]
    found = kernel.probabilities(torch.tensor([z]), logits, Interval(0.6, 0.4))[0]
    torch.testing.assert_close(found[: len(expected)], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-7)
    torch.testing.assert_close(found, mixture(diffusion, z, logits[0], temperature=1.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("z", [0, 1, 3])
def test_the_temperature_sharpens_the_full_prediction(temperature, z):
    diffusion = diffusion_of("hybrid")
    logits = torch.tensor([0.3, 0.5, -0.2, 4.0])
    found = kernel_of(diffusion, temperature=temperature).probabilities(torch.tensor([z]), logits[None], Interval(0.6, 0.4))[0]
    torch.testing.assert_close(found, mixture(diffusion, z, logits.double(), temperature), rtol=0, atol=1e-12)


def mixture(diffusion: DiffusionConfig, z: int, logits: Tensor, temperature: float) -> Tensor:
    """Return the sum over x of p(x | canvas) q(z_s | z, x) for t = 0.6 and s = 0.4, where q(z_s | z, x) is by Bayes' rule."""
    size = len(logits)
    now, before = forward(diffusion, 0.6, size), forward(diffusion, 0.4, size)
    process, times = noise_process(diffusion), torch.tensor([0.6, 0.4], dtype=torch.float64)
    kept = process.alpha(times[0]) / process.alpha(times[1])
    ids = torch.arange(size)
    jump = process.noise(times[0], ids) - kept * process.noise(times[1], ids)
    step = kept * (ids == z) + jump[z]
    full = logits[: size - 1].softmax(dim=0) * now[:, z]
    full = full / full.sum()
    if temperature == 0:
        full = (full == full.max()).double()
    else:
        full = (full.log() / temperature).softmax(dim=0)
    return full @ (before * step / now[:, z, None])


def test_the_options_of_the_gidd_posterior():
    diffusion, logits, step = diffusion_of("hybrid"), torch.tensor([[0.3, 0.5, -0.2, 4.0]]), Interval(0.6, 0.4)
    ids = torch.tensor([MASK])
    plain = kernel_of(diffusion).probabilities(ids, logits, step)
    assert torch.equal(kernel_of(diffusion, "gidd_posterior").probabilities(ids, logits, step), plain)
    cut = kernel_of(diffusion, "gidd_posterior", gidd_min_p=float(plain.sort().values[0, 1])).probabilities(ids, logits, step)
    expected = torch.where(plain == plain.min(), 0, plain)
    torch.testing.assert_close(cut, expected / expected.sum())
    sharp = kernel_of(diffusion, "gidd_posterior", posterior_temperature=0.5).probabilities(ids, logits, step)
    torch.testing.assert_close(sharp, plain**2 / (plain**2).sum())
    for field in ({"gidd_min_p": 0.99}, {"posterior_temperature": 1e-3}):
        found = kernel_of(diffusion, "gidd_posterior", **field).probabilities(ids, logits, step)
        torch.testing.assert_close(found, (plain == plain.max()).double())
    grid = kernel_of(diffusion, "gidd_posterior", gidd_epsilon=0.1).plan(8, 4)
    assert [step.t for step in grid] == pytest.approx([0.7, 0.5, 0.3, 0.1])
    assert [step.s for step in grid[:-1]] == pytest.approx([0.5, 0.3, 0.1])
    assert grid[-1].s is None


def test_the_steps_of_the_ancestral_kernel_go_from_noise_to_the_text():
    assert kernel_of(diffusion_of("masked")).plan(2, 4) == [
        Interval(1, 0.75),
        Interval(0.75, 0.5),
        Interval(0.5, 0.25),
        Interval(0.25, None),
    ]


@pytest.mark.parametrize("name", ["masked", "cosine"])
def test_masks_follow_the_schedule(name):
    """The share of masks that are left after a step to s is the noising probability at s, and t tells the model this probability."""
    diffusion, states = diffusion_of(name, mask=15), []
    config = SamplingConfig(num_tokens=4000, num_steps=4, kernel="ancestral", temperature=1.0)
    times = []

    def predict(tokens: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        return torch.zeros(*tokens.shape, 16)

    completions = generate(predict, [[]], config, diffusion=diffusion, eos_token_id=16, device="cpu", on_step=states.append).completions
    assert times == pytest.approx([1, 0.75, 0.5, 0.25])
    process = noise_process(diffusion)
    for state, s in zip(states[:-1], (0.75, 0.5, 0.25), strict=True):
        share = process.noising_probability(torch.tensor(s, dtype=torch.float64))
        expect_shares(state.is_open.flatten().long().bincount(minlength=2).double(), torch.stack([1 - share, share]))
        assert not state.is_revised.any()
    expect_shares(completions.flatten().bincount(minlength=15).double(), torch.full((15,), 1 / 15, dtype=torch.float64))


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_the_model_gets_the_t_of_the_expected_share_of_noise(name):
    """Half of the canvas is a prompt, and the second of two blocks is noise while the first is denoised."""
    times = []

    def predict(tokens: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        return torch.zeros(*tokens.shape, 16)

    diffusion = diffusion_of(name, mask=15)
    for block_size, expected in ((None, [0.5, 0.375, 0.25, 0.125]), (2, [0.5, 0.375, 0.25, 0.125])):
        config = SamplingConfig(num_tokens=4, num_steps=4, kernel="ancestral", block_size=block_size)
        generate(predict, [[1, 2, 3, 4]], config, diffusion=diffusion, eos_token_id=16, device="cpu")
        assert times == pytest.approx(expected)
        times.clear()


def toy_logits(tokens: Tensor, t: Tensor) -> Tensor:
    """Return the logits of a model in closed form, which depends on all tokens and on t, with 20 ids."""
    total = (tokens + 1).sum(dim=1)[:, None, None]
    position = torch.arange(1, tokens.shape[1] + 1)[None, :, None]
    return 2 * torch.cos(0.7 * position * torch.arange(1, 21) + 0.13 * total + t[:, None, None])


def sample(prompts, name: str, model=toy_logits, on_step=None, suffixes=None, **settings):
    """Sample with ids 0 to 14 as words, 15 as the mask token, and 16 to 19 as ids that the tokenizer lacks and that noise may put."""
    fields = {
        "num_tokens": 8,
        "num_steps": 4,
        "temperature": 1.0,
        "kernel": "ancestral",
        "reviser": "self_correction",
        "correction_steps": 3,
    }
    diffusion = DiffusionConfig(mask_token_id=15, num_noise_ids=20, **PROCESSES[name])
    config = SamplingConfig(**{**fields, **settings})
    given = {"diffusion": diffusion, "eos_token_id": 20, "device": "cpu", "vocab_size": 15, "suffixes": suffixes, "on_step": on_step}
    return generate(model, prompts, config, **given)


class LongToyBlocks(ToyBlocks):
    """``toy_logits`` by blocks."""

    def predict_block(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        start = 0 if self.finished is None else self.finished.shape[1]
        seen = tokens if self.finished is None else torch.cat([self.finished, tokens], dim=1)
        return toy_logits(seen, timesteps)[:, start:]

    def append(self, tokens: Tensor) -> None:
        assert (tokens < 15).all(), "finished blocks have neither masks nor noise"
        super().append(tokens)


@pytest.mark.parametrize("kernel", ["ancestral", "gidd_posterior"])
@pytest.mark.parametrize("name", ["masked", "uniform", "hybrid"])
@pytest.mark.parametrize(
    "settings", slow_except([{"block_size": 4}], [{}, {"block_size": 4}, {"temperature": 0.0, "num_steps": 16}]), ids=str
)
def test_every_text_is_clean_and_depends_on_its_prompt_alone(name, kernel, settings):
    prompts, suffixes, states = [[1, 2], [3], [1, 2]], [[4, 5], [6], [4, 5]], []

    def check(state: DenoisingStep) -> None:
        states.append(state)
        for row, tokens in zip(state.rows, state.tokens.tolist(), strict=True):
            assert tokens[: state.start] == prompts[row]
            assert tokens[state.end :] == suffixes[row]
        assert not state.is_open[:, : state.start].any()
        assert not state.is_revised[:, : state.start].any()

    found = sample(prompts, name, on_step=check, suffixes=suffixes, kernel=kernel, **settings)
    assert found.completions.max() < 15
    assert not torch.equal(found.completions[0], found.completions[2]), "two rows have two streams of noise"
    alone = sample(prompts[:1], name, suffixes=suffixes[:1], kernel=kernel, **settings)
    assert torch.equal(alone.completions[0], found.completions[0])
    assert alone.num_forward_passes[0] == found.num_forward_passes[0] <= settings.get("num_steps", 4) + 3
    if name != "masked":
        assert any(state.is_revised.any() for state in states)


@pytest.mark.parametrize("name", ["masked", "uniform", "hybrid"])
def test_blocks_are_finished_one_after_the_other(name):
    """The tokens of a prompt that are in the first block stay too, in the steps and in the revision."""
    prompts = [[1, 2, 3, 4, 5], [6]]

    def check(state: DenoisingStep) -> None:
        assert all(tokens[: state.start] == prompts[row] for row, tokens in zip(state.rows, state.tokens.tolist(), strict=True))

    found = sample(prompts, name, LongToyBlocks(), on_step=check)
    assert found.completions.max() < 15
    assert torch.equal(sample(prompts[:1], name, LongToyBlocks()).completions[0], found.completions[0])


def problems_of(diffusion=(), **sampling) -> dict[str, str | None]:
    """Return the problems of a configuration whose loss is the bound, if ``diffusion`` names no other loss."""
    diffusion = {"num_noise_ids": 96, "t_min": 1e-4, "t_max": 0.9999, **dict(diffusion)}
    if diffusion.get("objective") in ("uniform", "hybrid"):
        diffusion = {"loss": "kl_is", **diffusion}
    config = tiny_config(diffusion=diffusion, sampling=sampling)
    return {problem.key: problem.suggestion for rule in NAME_RULES for problem in rule(config)}


def test_the_kernel_of_a_process():
    names = {
        objective: kernel_name(SamplingConfig(), DiffusionConfig(**fields, num_noise_ids=3)) for objective, fields in PROCESSES.items()
    }
    assert names == {"masked": "unmask", "cosine": "unmask", "uniform": "ancestral", "argmax": "ancestral", "hybrid": "ancestral"}
    assert kernel_name(SamplingConfig(kernel="gidd_posterior"), DiffusionConfig()) == "gidd_posterior"


@pytest.mark.parametrize("objective", ["diffusion", "uniform", "hybrid"])
def test_the_default_kernel_serves_every_process(objective):
    assert problems_of({"objective": objective}) == {}


@pytest.mark.parametrize(
    ("diffusion", "sampling", "expected"),
    [
        ({}, {"kernel": "ancestrall"}, {"sampling.kernel": "did you mean ancestral?"}),
        ({}, {"reviser": "self_corect"}, {"sampling.reviser": "did you mean self_correction?"}),
        ({"objective": "uniform"}, {"kernel": "unmask"}, {"sampling.kernel": "sampling.kernel=ancestral"}),
        ({"objective": "uniform"}, {"threshold": 0.9}, {"sampling.threshold": "sampling.threshold=null"}),
        ({}, {"threshold": 0.9, "kernel": "ancestral"}, {"sampling.threshold": "sampling.threshold=null"}),
        (
            {
                **{"objective": "hybrid", "prediction": "full", "shift": True, "block_size": 8},
                **{"loss": "cross_entropy", "weight": "constant", "loss_positions": "all"},
            },
            {},
            {"diffusion.prediction": "diffusion.shift=false"},
        ),
        ({"objective": "learned_masked", "loss": "per_id", "coupled_draws": True}, {"kernel": "ancestral"}, {}),
        ({"objective": "autoregressive"}, {"kernel": "ancestral", "threshold": 0.9}, {}),
        ({"objective": "hybrid"}, {"kernel": "unmask"}, {}),
        ({"objective": "uniform", "noise_schedule": "sine"}, {"kernel": "unmask"}, {"diffusion.noise_schedule": "did you mean cosine?"}),
    ],
)
def test_a_kernel_that_cannot_serve_the_model_is_refused(diffusion, sampling, expected):
    assert problems_of(diffusion, **sampling) == expected


def test_the_sampler_refuses_it_too():
    for settings, message in (
        ({"kernel": "unmask"}, "sampling.kernel"),
        ({"threshold": 0.5}, "sampling.threshold"),
        ({"kernel": "x"}, "valid: unmask"),
    ):
        with pytest.raises(UserError, match=message):
            sample([[1]], "uniform", **settings)
    assert math.isfinite(sample([[1]], "uniform", num_steps=1).completions.double().mean())
