"""Self-correction: what it repairs, when it ends, and what it leaves as it is.

Shapes: b = rows of a batch, l = tokens of a row, v = vocabulary.
"""

import pytest
import torch
from torch import Tensor

from tests.sampling.test_threshold import ToyBlocks
from w1train.config.errors import UserError
from w1train.config.schema import DiffusionConfig, SamplingConfig
from w1train.sampling import revision
from w1train.sampling.canvas import DenoisingStep
from w1train.sampling.denoise import generate, revise

VOCAB_SIZE, MASK, EOS = 12, 11, 0
HYBRID = DiffusionConfig(objective="hybrid", mask_token_id=MASK, num_noise_ids=MASK)


def word_at(position: int) -> int:
    """The token that the oracle finds at a position."""
    return 1 + position % 9


def oracle_logits(length: int) -> Tensor:
    """[l, v]: most probability at the token of each position, more at later positions, and even more at the mask token."""
    logits = torch.zeros(length, VOCAB_SIZE)
    logits[torch.arange(length), torch.tensor([word_at(position) for position in range(length)])] = torch.linspace(1.5, 3, length)
    logits[:, MASK] = 50
    return logits


def oracle(tokens: Tensor, t: Tensor) -> Tensor:
    assert t.tolist() == pytest.approx([0.01] * len(tokens))
    return oracle_logits(tokens.shape[1]).expand(len(tokens), -1, -1)


class OracleBlocks(ToyBlocks):
    """``oracle`` by blocks of four."""

    def predict_block(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        start = 0 if self.finished is None else self.finished.shape[1]
        return oracle_logits(start + tokens.shape[1])[start:].expand(len(tokens), -1, -1)


def text_of(positions: range, wrong: tuple[int, ...] = ()) -> list[int]:
    """The oracle's text, with a wrong token at some places of the text."""
    tokens = [word_at(position) for position in positions]
    return [10 if place in wrong else token for place, token in enumerate(tokens)]


def run(prompts, texts, model=oracle, on_step=None, diffusion=HYBRID, **settings):
    config = SamplingConfig(num_tokens=99, **{"reviser": "self_correction", **settings})
    return revise(model, prompts, texts, config, diffusion=diffusion, device="cpu", vocab_size=MASK, on_step=on_step)


def test_a_corrupted_text_is_repaired_token_by_token():
    """The most probable corrections come first, the prompt stays even where it is wrong, and a correct text takes one pass."""
    states: list[DenoisingStep] = []
    prompt = [10, 10]
    revised = run([prompt, prompt], [text_of(range(2, 12), (1, 4, 7)), text_of(range(2, 12))], on_step=states.append)
    assert revised.texts == [text_of(range(2, 12))] * 2
    assert revised.num_forward_passes == [4, 1]
    assert [state.is_revised[0].nonzero()[:, 0].tolist() for state in states] == [[9], [6], [3], []]
    assert {(state.num_steps, state.t, state.start, state.end) for state in states} == {(None, 0.01, 2, 12)}
    assert all(state.tokens[0, :2].tolist() == prompt for state in states)


def test_several_tokens_change_in_a_step():
    revised = run([[]], [text_of(range(10), (1, 4, 7))], correction_tokens=2)
    assert revised.texts == [text_of(range(10))]
    assert revised.num_forward_passes == [3]


def test_the_steps_are_limited():
    revised = run([[]], [text_of(range(10), (1, 4, 7))], correction_steps=2)
    assert revised.texts == [text_of(range(10), (1,))]
    assert revised.num_forward_passes == [2]


@pytest.mark.parametrize("patience", [1, 5])
def test_a_text_that_does_not_get_better_ends_the_steps(patience):
    """The model always prefers another token than the text has."""

    def contrary(tokens: Tensor, _t: Tensor) -> Tensor:
        return 9.0 * torch.nn.functional.one_hot(tokens % 9 + 1, VOCAB_SIZE)

    assert run([[]], [[1, 2, 3]], contrary, correction_patience=patience).num_forward_passes == [patience + 1]


def test_a_row_does_not_depend_on_the_others():
    def uncertain(tokens: Tensor, _t: Tensor) -> Tensor:
        return torch.cos(torch.arange(VOCAB_SIZE) * 0.7 + 0.13 * tokens.sum(dim=1)[:, None, None] + tokens[:, :, None])

    texts = [[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4]]
    settings = {"correction_temperature": 1.0, "correction_steps": 6}
    together = run([[9]] * 3, texts, uncertain, **settings)
    assert run([[9]], texts[:1], uncertain, **settings).texts == together.texts[:1]
    assert together.texts[0] != together.texts[2], "two rows have two streams of noise"
    assert run([[9]] * 3, texts, uncertain, seed=1, **settings).texts != together.texts


def test_texts_of_all_lengths_and_of_no_length():
    texts = [text_of(range(1, 8), (2,)), text_of(range(3), (0,)), []]
    revised = run([[1], [], [2]], texts)
    assert revised.texts == [text_of(range(1, 8)), text_of(range(3)), []]
    assert revised.num_forward_passes == [2, 2, 0]


@pytest.mark.parametrize("block_size", [None, 2])
def test_blocks_are_revised_before_the_next_block_sees_them(block_size):
    model = OracleBlocks()
    revised = run([[10]], [text_of(range(1, 10), (0, 5, 6))], model, block_size=block_size)
    assert revised.texts == [text_of(range(1, 10))]
    assert model.finished[0].tolist() == [10, *text_of(range(1, 8))], "the prompt stays"


def test_it_follows_every_kernel():
    """A model that first writes a wrong token corrects it: with t of self-correction it knows better."""

    def model(tokens: Tensor, t: Tensor) -> Tensor:
        logits = oracle_logits(tokens.shape[1]).repeat(len(tokens), 1, 1)
        logits[t > 0.02, 5, 10] = 40
        return logits

    for kernel in ("unmask", "ancestral", "gidd_posterior"):
        for reviser, expected in ((None, text_of(range(8), (5,))), ("self_correction", text_of(range(8)))):
            config = SamplingConfig(num_tokens=8, num_steps=4, kernel=kernel, reviser=reviser, gidd_epsilon=0.1)
            found = generate(model, [[]], config, diffusion=HYBRID, eos_token_id=EOS, device="cpu", vocab_size=MASK)
            assert found.completions.tolist() == [expected], (kernel, reviser)


def test_a_full_prediction_is_converted():
    """A model that sees the token itself always finds it most probable. Without its own evidence another token is."""

    def full(tokens: Tensor, _t: Tensor) -> Tensor:
        return oracle_logits(tokens.shape[1]) + 6.5 * torch.nn.functional.one_hot(tokens, VOCAB_SIZE)

    corrupted = text_of(range(10), (1, 4, 7))
    assert run([[]], [corrupted], full).texts == [corrupted]
    assert run([[]], [corrupted], full, diffusion=DiffusionConfig(**{**vars_of(HYBRID), "prediction": "full"})).texts == [
        text_of(range(10))
    ]


def vars_of(config: DiffusionConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in ("objective", "mask_token_id", "num_noise_ids")}


def test_a_model_of_masks_is_said_to_know_no_wrong_tokens(caplog):
    revision._say_that_the_noise_is_masks.cache_clear()
    run([[]], [[1]], diffusion=DiffusionConfig(mask_token_id=MASK))
    assert "masked diffusion, which never puts a wrong token in the text" in caplog.text


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([[1, MASK]], {}, r"text 0 has the mask token \(11\) at position 1"),
        ([[1], [2]], {}, "2 texts for 1 prompts"),
        ([[1]], {"reviser": "w1_jump"}, "sampling.reviser is 'w1_jump'; valid: conditional_modes, self_correction"),
    ],
)
def test_bad_texts_and_settings(texts, settings, message):
    with pytest.raises(UserError, match=message):
        run([[1]], texts, **settings)
