"""Conditional modes, against a distribution of texts that is small enough for the posterior of every text.

Shapes: b = texts, l = tokens of a text, v = vocabulary.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.sampling.test_threshold import ToyBlocks
from w1train.config.schema import DiffusionConfig, SamplingConfig
from w1train.diffusion.prediction import evidence, full_from_leave_one_out
from w1train.diffusion.processes import noise_process
from w1train.sampling import revision
from w1train.sampling.canvas import DenoisingStep
from w1train.sampling.denoise import generate, revise

NUM_WORDS, LENGTH, MASK, EOS = 4, 4, 4, 9
HYBRID = {"objective": "hybrid", "mask_token_id": MASK, "num_noise_ids": NUM_WORDS}
UNIFORM = {"objective": "uniform", "mask_token_id": MASK, "num_noise_ids": NUM_WORDS}
TEXTS = torch.tensor(list(itertools.product(range(NUM_WORDS), repeat=LENGTH)))
"""Every text, int64 [v^l, l]."""


def text_probabilities(certainty: float) -> Tensor:
    """Return p(x) of every text, float64 [v^l]: each token is the one after its predecessor with the probability ``certainty``."""
    follows = (TEXTS[:, 1:] - TEXTS[:, :-1]) % NUM_WORDS == 1
    return torch.where(follows, certainty, (1 - certainty) / (NUM_WORDS - 1)).double().prod(dim=1) / NUM_WORDS


class Oracle:
    """The exact prediction of each token given all other tokens after noise, by enumeration of all texts."""

    def __init__(self, diffusion: DiffusionConfig, certainty: float) -> None:
        self.process, self.probabilities, self.is_full = (
            noise_process(diffusion),
            text_probabilities(certainty),
            diffusion.prediction == "full",
        )

    def joint(self, tokens: Tensor, t: Tensor, skipped: int | None = None) -> Tensor:
        """Return p(x) q_t(z | x), float64 [b, v^l], without the noise of the position ``skipped``."""
        time = t.double()[:, None, None]
        noise = self.process.alpha(time) * (tokens[:, None] == TEXTS) + self.process.noise(time, tokens[:, None])
        if skipped is not None:
            noise[:, :, skipped] = 1
        return self.probabilities * noise.prod(dim=2)

    def marginals(self, tokens: Tensor, t: Tensor, *, leave_one_out: bool) -> Tensor:
        """Return p(x_i | z), or p(x_i | z without z_i), float64 [b, l, v]."""
        found = [self.joint(tokens, t, position if leave_one_out else None) @ self.is_word(position) for position in range(LENGTH)]
        weights = torch.stack(found, dim=1)
        return weights / weights.sum(dim=2, keepdim=True)

    def is_word(self, position: int) -> Tensor:
        return torch.nn.functional.one_hot(TEXTS[:, position], NUM_WORDS).double()

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        """Return logits [b, l, v + 1]. The mask token has a logit that the reviser may not choose."""
        logits = self.marginals(tokens, t, leave_one_out=not self.is_full).log()
        return torch.nn.functional.pad(logits, (0, 1), value=50.0)


def run(texts, model, diffusion, prompts=None, on_step=None, **settings):
    config = SamplingConfig(num_tokens=99, **{"reviser": "conditional_modes", **settings})
    prompts = [[]] * len(texts) if prompts is None else prompts
    return revise(model, prompts, texts, config, diffusion=diffusion, device="cpu", vocab_size=NUM_WORDS, on_step=on_step)


@pytest.mark.parametrize("fields", [HYBRID, UNIFORM, {**HYBRID, "prediction": "full"}], ids=str)
def test_a_step_makes_as_many_tokens_right_as_it_promises(fields):
    """Over all texts x and all noisy texts z with their exact probabilities, a step lowers the mean number of wrong tokens by the largest
    gain of the exact posterior."""
    diffusion, t = DiffusionConfig(**fields), torch.full((len(TEXTS),), 0.2)
    model = Oracle(diffusion, 0.8)
    revised = torch.tensor(run(TEXTS.tolist(), model, diffusion, correction_steps=1, correction_timestep=0.2).texts)
    joint, posterior = model.joint(TEXTS, t), model.marginals(TEXTS, t, leave_one_out=False)
    num_wrong = [(joint * (tokens[:, None] != TEXTS).sum(dim=2)).sum() for tokens in (TEXTS, revised)]
    gains = posterior.max(dim=2).values - posterior.gather(2, TEXTS[:, :, None])[:, :, 0]
    promised = (joint.sum(dim=1) * gains.max(dim=1).values).sum()
    assert (num_wrong[0] - num_wrong[1]).item() == pytest.approx(promised.item(), rel=1e-6)
    assert promised > 0.01


def test_gidds_rule_makes_right_tokens_wrong_with_the_exact_prediction():
    """The mean is over all texts x and all noisy texts z, with their exact probabilities."""
    diffusion, t = DiffusionConfig(**HYBRID), torch.full((len(TEXTS),), 0.2)
    model = Oracle(diffusion, 0.8)
    settings = {"reviser": "self_correction", "correction_steps": 1, "correction_timestep": 0.2}
    revised = torch.tensor(run(TEXTS.tolist(), model, diffusion, **settings).texts)
    joint = model.joint(TEXTS, t)
    before, after = ((joint * (tokens[:, None] != TEXTS).sum(dim=2)).sum().item() for tokens in (TEXTS, revised))
    assert after > 1.3 * before


@pytest.mark.parametrize("fields", [HYBRID, UNIFORM, {**HYBRID, "prediction": "full"}], ids=str)
def test_single_wrong_tokens_are_repaired_and_likely_texts_stay(fields):
    diffusion = DiffusionConfig(**fields)
    likely = [[(first + place) % NUM_WORDS for place in range(LENGTH)] for first in range(NUM_WORDS)]
    corrupted = [
        [*text[:place], (text[place] + step) % NUM_WORDS, *text[place + 1 :]]
        for text in likely
        for place in range(LENGTH)
        for step in range(1, NUM_WORDS)
    ]
    revised = run([*likely, *corrupted], Oracle(diffusion, 0.999), diffusion)
    assert revised.texts == likely + [text for text in likely for _ in range(LENGTH * (NUM_WORDS - 1))]
    assert revised.num_forward_passes == [1] * len(likely) + [2] * len(corrupted)


def test_a_token_that_the_text_allows_stays_if_noise_is_rare():
    """The same text changes at a t where noise is more probable than the token."""
    diffusion = DiffusionConfig(**UNIFORM)
    texts = [[0, 1, 2, 2]]
    model = Oracle(diffusion, 0.8)
    assert run(texts, model, diffusion, correction_timestep=1e-4).texts == texts
    assert run(texts, model, diffusion, correction_timestep=0.4).texts == [[0, 1, 2, 3]]


def peaked(wanted: list[int], strengths: list[float]):
    """Return a model whose logit of the wanted token of each position has a strength, and whose other logits are 0."""

    def model(tokens: Tensor, _t: Tensor) -> Tensor:
        end = tokens.shape[1]
        rows = torch.nn.functional.one_hot(torch.tensor(wanted[:end]), NUM_WORDS + 1) * torch.tensor(strengths[:end])[:, None]
        return rows.expand(len(tokens), -1, -1).clone()

    return model


def test_the_largest_gains_come_first():
    """The candidate of the third position is the most probable one, but its present token is not improbable enough to change."""
    diffusion = DiffusionConfig(**HYBRID)

    def model(tokens: Tensor, t: Tensor) -> Tensor:
        logits = peaked([0, 0, 0, 0], [6.0, 9.0, 12.0, 7.0])(tokens, t)
        logits[:, 2, 1] = 11.0
        return logits

    states: list[DenoisingStep] = []
    revised = run([[1, 1, 1, 1]], model, diffusion, on_step=states.append)
    assert revised.texts == [[0, 0, 1, 0]]
    assert [state.is_revised[0].nonzero()[:, 0].tolist() for state in states] == [[1], [3], [0], []]
    assert {(state.num_steps, round(state.t, 6)) for state in states} == {(None, 0.01)}
    assert run([[1, 1, 1, 1]], model, diffusion, correction_tokens=2).num_forward_passes == [3]
    assert run([[1, 1, 1, 1]], model, diffusion, correction_steps=2).texts == [[1, 0, 1, 0]]


def test_the_evidence_is_that_of_the_process():
    """A change needs 1 + alpha / c times the probability of the present token."""
    diffusion = DiffusionConfig(**HYBRID)
    process, t = noise_process(diffusion), torch.tensor(0.01, dtype=torch.float64)
    needed = math.log1p((process.alpha(t) / process.word_noise(t)).item())
    for excess, expected in ((-0.01, [1]), (0.01, [0])):
        assert run([[1]], peaked([0], [needed + excess]), diffusion).texts == [expected]
    logits, ids = torch.zeros(1, NUM_WORDS), torch.tensor([1])
    assert full_from_leave_one_out(logits, ids, evidence(process, t[None], ids))[0, 1].item() == pytest.approx(needed)


def test_prompts_stay_and_rows_end_apart():
    diffusion = DiffusionConfig(**HYBRID)
    model = peaked([0] * 6, [15.0] * 6)
    revised = run([[1, 1, 2], [0, 0, 0], [], [3, 0]], model, diffusion, prompts=[[2, 2], [1, 1], [1], [1]])
    assert revised.texts == [[0, 0, 0], [0, 0, 0], [], [0, 0]]
    assert revised.num_forward_passes == [4, 1, 0, 2]


def test_blocks_are_revised_before_the_next_block_sees_them():
    class Blocks(ToyBlocks):
        def predict_block(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
            return peaked([0] * 4, [15.0] * 4)(tokens, timesteps)

    model = Blocks()
    revised = run([[1] * 9], model, DiffusionConfig(**HYBRID), prompts=[[2]])
    assert revised.texts == [[0] * 9]
    assert model.finished[0].tolist() == [2, *[0] * 7]


def test_it_follows_generation():
    config = SamplingConfig(num_tokens=4, num_steps=2, kernel="ancestral", reviser="conditional_modes", temperature=1.0)
    model = peaked([0] * 4, [15.0] * 4)
    given = {"diffusion": DiffusionConfig(**HYBRID), "eos_token_id": EOS, "device": "cpu", "vocab_size": NUM_WORDS}
    assert generate(model, [[]], config, **given).completions.tolist() == [[0] * 4]


def test_a_model_of_masks_leaves_a_text_as_it_is(caplog):
    """A token that is visible is right, because masks are the only noise."""
    revision._say_that_the_noise_is_masks.cache_clear()
    assert run([[1, 2]], peaked([0, 0], [40.0, 40.0]), DiffusionConfig(mask_token_id=MASK)).texts == [[1, 2]]
    assert "masked diffusion, which never puts a wrong token in the text" in caplog.text


def test_it_is_the_reviser_of_given_texts_without_a_name():
    found = revise(
        peaked([0], [5.0]),
        [[]],
        [[1]],
        SamplingConfig(num_tokens=9),
        diffusion=DiffusionConfig(**HYBRID),
        device="cpu",
        vocab_size=NUM_WORDS,
    )
    assert found.texts == [[1]], "self-correction would change it"
