"""Threshold decoding, and generation by blocks over toy models in closed form."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.sampling.test_denoise import EOS, MASK, VOCAB_SIZE, prompt_lists, run, toy_logits, unmask
from tests.slow import examples
from w1train.config.schema import SamplingConfig
from w1train.sampling.canvas import DenoisingStep, Generation
from w1train.sampling.counts import above_threshold
from w1train.sampling.denoise import plan_blocks


@pytest.mark.parametrize(("threshold", "expected"), [(0.95, [1, 0, 0, 0]), (0.5, [1, 1, 0, 0]), (0.99, [1, 0, 0, 0])])
def test_golden_choices(threshold, expected):
    """Of maximum probabilities .97, .6, (decided), .4."""
    confidence = torch.tensor([[0.97, 0.6, -math.inf, 0.4]])
    assert above_threshold(confidence, threshold).int().tolist() == [expected]


def test_a_confidence_equal_to_the_threshold_is_not_above_it():
    """A threshold of 1 would otherwise decide every token whose float probability is rounded to 1."""
    confidence = torch.tensor([[0.5, 0.75, 0.5, 0.75], [1.0, 1.0, 0.25, 1.0]], dtype=torch.float64)
    assert above_threshold(confidence, 0.5).int().tolist() == [[0, 1, 0, 1], [1, 1, 0, 1]]
    assert above_threshold(confidence, 0.75).int().tolist() == [[0, 1, 0, 0], [1, 1, 0, 1]]
    assert above_threshold(confidence, 1.0).int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(("threshold", "expected"), [(0.95, [1, 0, 0, 0]), (0.5, [1, 1, 0, 0]), (0.99, [1, 0, 0, 0])])
def test_golden_choices_through_a_model(threshold, expected):
    """The same probabilities as a model's: after one step as many tokens are there."""
    states: list[DenoisingStep] = []
    config = SamplingConfig(num_tokens=3, threshold=threshold)
    run([[9, 9]], config, lambda _tokens, _t: _with_probabilities([0.5, 0.5, 0.97, 0.6, 0.4])[None], states.append)
    shown = (states[0].tokens[0, 2:] != MASK).int().tolist()
    assert shown == [expected[0], expected[1], expected[3]]
    assert states[0].num_steps is None


def _with_probabilities(probabilities: list[float]) -> Tensor:
    """[l, v]: token 5 has the probability, the others but the mask share the rest."""
    rest = (1 - torch.tensor(probabilities, dtype=torch.float64)) / (VOCAB_SIZE - 2)
    logits = rest.log()[:, None].repeat(1, VOCAB_SIZE)
    logits[:, 5] = torch.tensor(probabilities, dtype=torch.float64).log()
    return logits


class ToyBlocks:
    """A block-diffusion model in closed form: logits of a position follow from it, the tokens seen, and t."""

    block_size = 4

    def start(self, length: int, block_size: int) -> None:
        self.length, self.used_block_size = length, block_size
        self.finished = None

    def append(self, tokens: Tensor) -> None:
        assert not (tokens == MASK).any(), "finished blocks are clean"
        assert tokens.shape[1] % self.used_block_size == 0
        self.finished = tokens if self.finished is None else torch.cat([self.finished, tokens], dim=1)
        assert self.finished.shape[1] <= self.length

    def predict_block(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        torch.testing.assert_close(timesteps, (tokens == MASK).float().mean(dim=1))
        assert tokens.shape[1] <= self.used_block_size
        start = 0 if self.finished is None else self.finished.shape[1]
        assert start % self.used_block_size == 0
        seen = tokens if self.finished is None else torch.cat([self.finished, tokens], dim=1)
        return 1.5 * toy_logits(seen, timesteps)[:, start:]

    def select_rows(self, rows: Tensor) -> None:
        self.finished = self.finished[rows] if self.finished is not None else None


def literal(prompt: list[int], config: SamplingConfig) -> tuple[list[int], int]:
    """One row at temperature 0 in plain Python: (completion, passes). After a block with EOS, EOS."""
    block_size = config.block_size or ToyBlocks.block_size
    length = len(prompt) + config.num_tokens
    canvas = prompt + [MASK] * config.num_tokens
    first = len(prompt) // block_size * block_size
    passes = 1 if first else 0
    for start in range(first, length, block_size):
        end = min(start + block_size, length)
        passes += start > first
        num_masked = canvas[start:end].count(MASK)
        steps = min(num_masked, math.ceil(num_masked * config.num_steps / config.num_tokens))
        step = 0
        while MASK in canvas[start:end]:
            logits = 1.5 * toy_logits(torch.tensor([canvas[:end]]), torch.zeros(1))[0].double()
            logits[:, MASK] = -math.inf
            scored = []
            for position in range(start, end):
                if canvas[position] == MASK:
                    token = int(logits[position].argmax())
                    scored.append((-float(logits[position].log_softmax(0)[token]), position, token))
            scored.sort()
            if config.threshold is None:
                chosen = scored[: num_masked // steps + (step < num_masked % steps)]
            else:
                chosen = scored[:1] + [each for each in scored[1:] if math.exp(-each[0]) > config.threshold]
            for _, position, token in chosen:
                canvas[position] = token
            step += 1
        passes += step
        if EOS in canvas[len(prompt) : end]:
            return canvas[len(prompt) : end] + [EOS] * (length - end), passes
    return canvas[len(prompt) :], passes


block_settings = st.fixed_dictionaries(
    {
        "num_tokens": st.integers(1, 14),
        "num_steps": st.integers(1, 16),
        "block_size": st.sampled_from([None, None, 1, 3, 20]),
        "threshold": st.sampled_from([None, 0.2, 0.5, 0.9, 1.0]),
    }
)


@given(block_settings, prompt_lists)
@settings(max_examples=examples(80), deadline=None)
def test_greedy_blocks_are_exactly_the_argmax_path(fields, prompts):
    """Any prompt length, block size and number of steps; rows end and fill up at different steps."""
    config = SamplingConfig(**fields)
    generation = run(prompts, config, ToyBlocks())
    expected = [literal(prompt, config) for prompt in prompts]
    assert generation.completions.tolist() == [completion for completion, _ in expected]
    assert generation.num_forward_passes == [passes for _, passes in expected]


@given(st.sampled_from([0.05, 0.3, 0.6, 1.0]), st.sampled_from([None, 2, 4]), prompt_lists)
@settings(max_examples=examples(40), deadline=None)
def test_threshold_over_the_whole_canvas(threshold, block_size, prompts):
    """Masked diffusion: every step unmasks what exceeds the threshold and the most confident, whatever the other rows do."""
    states: list[DenoisingStep] = []
    logits: list[Tensor] = []

    def predict(tokens: Tensor, t: Tensor) -> Tensor:
        logits.append(toy_logits(tokens, t))
        return logits[-1]

    config = SamplingConfig(num_tokens=8, threshold=threshold, block_size=block_size, num_steps=3)
    generation = run(prompts, config, predict, states.append)
    before: dict[tuple[int, ...], Tensor] = {}
    for state, seen in zip(states, logits, strict=True):
        start = len(prompts[state.rows[0]])
        old = before.get(tuple(state.rows), torch.nn.functional.pad(state.tokens[:, :start], (0, 8), value=MASK))
        probabilities = seen.double().index_fill(2, torch.tensor(MASK), -math.inf).softmax(dim=2).amax(dim=2)
        for row in range(len(state.rows)):
            masked = [place for place in range(start, start + 8) if old[row, place] == MASK]
            width = block_size or 8
            # Of the first block that is open in any row: that is where the batch is.
            first_open = min(int((old[:, start:] == MASK).nonzero()[:, 1].min()) // width * width + start, start + 8)
            masked = [place for place in masked if first_open <= place < first_open + width]
            expected = {place for place in masked if probabilities[row, place] > threshold}
            expected |= {max(masked, key=lambda place: (float(probabilities[row, place]), -place))} if masked else set()
            assert {place for place in masked if state.tokens[row, place] != MASK} == expected
        before[tuple(state.rows)] = state.tokens
    assert not (generation.completions == MASK).any()


def test_a_threshold_of_one_unmasks_one_by_one_and_a_low_one_all_at_once():
    one_by_one = SamplingConfig(num_tokens=8, num_steps=8, block_size=4)
    assert (
        run([[3]], SamplingConfig(num_tokens=8, threshold=1.0, block_size=4)).completions.tolist()
        == run([[3]], one_by_one).completions.tolist()
    )
    generation = run([[3]], SamplingConfig(num_tokens=8, threshold=1e-6))
    assert generation.num_forward_passes == [1]
    at_once = run([[3]], SamplingConfig(num_tokens=8, num_steps=1))
    assert torch.equal(generation.completions, at_once.completions)


class EosAt(ToyBlocks):
    """The row whose first token is n says EOS at position n and letter 7 elsewhere."""

    def predict_block(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        start = 0 if self.finished is None else self.finished.shape[1]
        first = (tokens if self.finished is None else self.finished)[:, 0]
        self.passes.append(first.tolist())
        logits = torch.zeros(*tokens.shape, VOCAB_SIZE)
        logits[:, :, 7] = 5
        for row, place in enumerate(first.tolist()):
            if start <= place < start + tokens.shape[1]:
                logits[row, place - start, EOS] = 9
        return logits

    passes: list[list[int]]


def test_rows_that_have_ended_leave_the_batch():
    """As if the rest had been computed: the text is cut at EOS all the same."""
    model = EosAt()
    model.passes = []
    generation: Generation = run([[2], [14], [9], [5]], SamplingConfig(num_tokens=15, num_steps=1), model)
    assert [len(generation.completion(row)) for row in range(4)] == [1, 13, 8, 4]
    assert model.passes == [[2, 14, 9, 5], [14, 9, 5], [14, 9], [14]]
    assert generation.completions[0].tolist() == [7, EOS, 7] + [EOS] * 12
    assert generation.num_forward_passes == [1, 7, 5, 3]


def test_nothing_runs_after_the_last_row_has_ended():
    model = EosAt()
    model.passes = []
    run([[5], [6]], SamplingConfig(num_tokens=40, num_steps=1), model)
    assert model.passes == [[5, 6], [5, 6]]


def test_eos_in_the_prompt_ends_nothing():
    config = SamplingConfig(num_tokens=6, num_steps=6)
    generation = run([[EOS, 3, 4, 5, EOS]], config, ToyBlocks())
    assert generation.completions.tolist() == [literal([EOS, 3, 4, 5, EOS], config)[0]]


def test_blocks_of_another_size_than_trained_are_said_once(caplog):
    config = SamplingConfig(num_tokens=12, num_steps=12, block_size=6)
    with caplog.at_level(logging.WARNING):
        run([[1, 2]], config, ToyBlocks())
        run([[1, 2]], config, ToyBlocks())
        run([[1, 2]], SamplingConfig(num_tokens=12, num_steps=12), ToyBlocks())
    assert [record.message for record in caplog.records] == [
        "sampling.block_size is 6, but the model was trained with blocks of 4 tokens: expect other text"
    ]


def test_short_blocks_take_whole_steps(caplog):
    config = SamplingConfig(num_tokens=8, num_steps=4)
    plan = plan_blocks(config, unmask(config).plan, prompt_length=3, trained_block_size=4)
    assert [(block.start, block.end, block.steps) for block in plan] == [(0, 4, [1]), (4, 8, [2, 2]), (8, 11, [2, 1])]
    with caplog.at_level(logging.INFO):
        run([[1, 2, 3]], config, ToyBlocks())
    assert "5 denoising steps instead of 4" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 0.0}, "sampling.threshold is 0.0; it must be a probability above 0, or null"),
        ({"threshold": math.nan}, "sampling.threshold is nan"),
        ({"threshold": 0.9, "remasking": "random"}, "such as low_confidence, because sampling.threshold is compared"),
        ({"threshold": 0.9, "block_size": 5}, "a divisor of sampling.num_tokens"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        run([[1]], SamplingConfig(num_tokens=12, num_steps=6, **changes))


def test_what_does_not_divide_is_fine_for_blocks_and_thresholds():
    run([[1]], SamplingConfig(num_tokens=7, num_steps=5, block_size=3), ToyBlocks())
    run([[1]], SamplingConfig(num_tokens=8, num_steps=5, block_size=4, threshold=0.5))
