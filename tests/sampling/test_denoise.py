"""The sampler against LLaDA's published outputs, a literal reference, and the invariants of denoising.

Shapes: as in w1train/sampling/denoise.py.
"""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.slow import examples
from w1train.config.schema import DiffusionConfig, SamplingConfig
from w1train.sampling.canvas import DenoisingStep, Generation, PlannedBlock, cut_at_end
from w1train.sampling.counts import transfer_counts
from w1train.sampling.denoise import generate, plan_blocks
from w1train.sampling.kernel import Batch
from w1train.sampling.unmask import Unmask

VOCAB_SIZE, MASK, EOS = 16, 15, 0
DIFFUSION = DiffusionConfig(mask_token_id=MASK)


def toy_logits(tokens: Tensor, _t: Tensor) -> Tensor:
    """A model in closed form, 3 cos(0.7 (i + 1)(v + 1) + 0.13 sum) at position i for token v. The sum is over token + 1 of all tokens that
    are not masked, prompt included."""
    total = ((tokens + 1) * (tokens != MASK)).sum(dim=1)[:, None, None]
    position = torch.arange(1, tokens.shape[1] + 1)[None, :, None]
    return 3 * torch.cos(0.7 * position * torch.arange(1, VOCAB_SIZE + 1) + 0.13 * total)


def run(prompts, config: SamplingConfig, predict=toy_logits, on_step=None) -> Generation:
    return generate(predict, prompts, config, diffusion=DIFFUSION, eos_token_id=EOS, device="cpu", on_step=on_step)


def unmask(config: SamplingConfig, rows=(0,)) -> Unmask:
    return Unmask(Batch(config, DIFFUSION, list(rows), None, "cpu"))


@st.composite
def sampling_configs(draw, **fixed) -> SamplingConfig:
    block_size, num_blocks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    drawn = {
        "num_tokens": block_size * num_blocks,
        "num_steps": num_blocks * draw(st.integers(1, 6)),
        "block_size": draw(st.sampled_from([block_size, None])) if num_blocks == 1 else block_size,
        "temperature": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "remasking": draw(st.sampled_from(["low_confidence", "random"])),
        "seed": draw(st.integers(0, 10)),
    }
    return SamplingConfig(**(drawn | fixed))


prompt_lists = st.lists(st.lists(st.integers(0, MASK - 1), max_size=4), min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("num_steps", "block_size", "expected"),
    [(8, 8, [7, 8, 12, 11, 7, 0, 6, 2]), (4, 4, [3, 4, 0, 10, 5, 14, 2, 13])],
)
def test_llada_golden_outputs(num_steps, block_size, expected):
    config = SamplingConfig(num_tokens=8, num_steps=num_steps, block_size=block_size)
    assert run([[3, 1, 4]], config).completions.tolist() == [expected]
    assert run(torch.tensor([[3, 1, 4]]), config).completions.tolist() == [expected]


@pytest.mark.parametrize(
    ("masked", "steps", "expected"), [(10, 4, [3, 3, 2, 2]), (7, 4, [2, 2, 2, 1]), (7, 3, [3, 2, 2]), (2, 3, [1, 1, 0])]
)
def test_transfer_counts(masked, steps, expected):
    assert transfer_counts(masked, steps) == expected


def literal_greedy(prompt: list[int], config: SamplingConfig) -> list[int]:
    """Algorithm 5 at temperature 0, one token at a time in plain Python."""
    block_size = config.block_size or config.num_tokens
    steps_per_block = config.num_steps * block_size // config.num_tokens
    canvas = prompt + [MASK] * config.num_tokens
    for block_start in range(len(prompt), len(canvas), block_size):
        for step in range(steps_per_block):
            logits = toy_logits(torch.tensor([canvas]), torch.zeros(1))[0].double()
            logits[:, MASK] = -math.inf
            scored = []
            for position in range(block_start, block_start + block_size):
                if canvas[position] == MASK:
                    probabilities = logits[position].softmax(0)
                    token = int(probabilities.argmax())
                    scored.append((-float(probabilities[token]), position, token))
            count = block_size // steps_per_block + (step < block_size % steps_per_block)
            for _, position, token in sorted(scored)[:count]:
                canvas[position] = token
    return canvas[len(prompt) :]


@given(sampling_configs(temperature=0.0, remasking="low_confidence"), prompt_lists)
@settings(max_examples=examples(40), deadline=None)
def test_greedy_is_exactly_the_argmax_path(config, prompts):
    assert run(prompts, config).completions.tolist() == [literal_greedy(prompt, config) for prompt in prompts]


def _steps(config: SamplingConfig, prompt_length: int) -> list[tuple[PlannedBlock, int]]:
    return [(block, count) for block in plan_blocks(config, unmask(config).plan, prompt_length) for count in block.steps]


@given(sampling_configs(), prompt_lists)
@settings(max_examples=examples(60), deadline=None)
def test_every_step_unmasks_the_planned_tokens_and_changes_nothing_else(config, prompts):
    seen: list[DenoisingStep] = []
    times: list[float] = []

    def predict(tokens: Tensor, t: Tensor) -> Tensor:
        assert tokens.dtype == torch.int64
        assert t.dtype == torch.float32
        torch.testing.assert_close(t, (tokens == MASK).float().mean(dim=1))
        times.append(float(t[0]))
        return toy_logits(tokens, t)

    generation = run(prompts, config, predict, seen.append)
    plans = {len(prompt): _steps(config, len(prompt)) for prompt in prompts}
    num_steps = len(plans[len(prompts[0])])
    assert generation.num_forward_passes == [num_steps] * len(prompts)
    assert num_steps <= config.num_steps
    assert [state.t for state in seen] == times
    batches = {tuple(state.rows): [] for state in seen}
    for state in seen:
        batches[tuple(state.rows)].append(state.tokens)
    opened = (state.is_open for state in seen)
    assert sorted(row for rows in batches for row in rows) == list(range(len(prompts)))
    for rows, states in batches.items():
        prompt = torch.tensor([prompts[row] for row in rows], dtype=torch.int64).reshape(len(rows), -1)
        before = torch.nn.functional.pad(prompt, (0, config.num_tokens), value=MASK)
        for (block, num_unmasked), after in zip(plans[prompt.shape[1]], states, strict=True):
            newly = (before == MASK) & (after != MASK)
            assert torch.equal(after == MASK, next(opened))
            assert torch.equal(before[~newly], after[~newly])  # the prompt, decided tokens and remaining masks stay
            assert newly.sum(dim=1).tolist() == [num_unmasked] * len(rows)
            columns = newly.any(dim=0).nonzero()[:, 0]
            assert block.start <= int(columns.min()) <= int(columns.max()) < block.end
            before = after
        assert not (before == MASK).any()
        assert torch.equal(before[:, prompt.shape[1] :], generation.completions[list(rows)])


@given(sampling_configs(), prompt_lists, prompt_lists)
@settings(max_examples=examples(40), deadline=None)
def test_a_row_does_not_depend_on_the_other_prompts(config, prompts, others):
    alone = run(prompts[:1], config).completions[0]
    assert torch.equal(run(prompts[:1] + others, config).completions[0], alone)
    last = len(prompts) - 1
    replaced = [others[0]] * last + prompts[-1:]
    assert torch.equal(run(prompts, config).completions[last], run(replaced, config).completions[last])


def test_seed_and_place_decide_the_noise():
    config = SamplingConfig(num_tokens=16, num_steps=4, temperature=1.0, seed=3)
    twins = run([[1], [1]], config).completions
    assert not torch.equal(twins[0], twins[1])
    assert torch.equal(run([[1], [1]], config).completions, twins)
    config.seed = 4
    assert not torch.equal(run([[1], [1]], config).completions, twins)


def test_a_model_that_prefers_the_mask_token_still_fills_the_canvas():
    def predict(tokens: Tensor, _t: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, VOCAB_SIZE).index_fill(2, torch.tensor([MASK]), 1e4)

    for temperature in (0.0, 1.0):
        config = SamplingConfig(num_tokens=12, num_steps=3, temperature=temperature)
        assert not (run([[]], config, predict).completions == MASK).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_beyond_the_tokenizer_are_never_generated(temperature):
    def predict(tokens: Tensor, _t: Tensor) -> Tensor:
        return torch.arange(float(VOCAB_SIZE)).expand(*tokens.shape, -1) * 10

    config = SamplingConfig(num_tokens=12, num_steps=3, temperature=temperature)
    generation = generate(predict, [[]], config, diffusion=DIFFUSION, eos_token_id=EOS, device="cpu", vocab_size=11)
    assert generation.completions.max() == 10
    beyond = generate(predict, [[]], config, diffusion=DiffusionConfig(mask_token_id=3), eos_token_id=EOS, device="cpu")
    assert beyond.completions.max() == VOCAB_SIZE - 1


def test_the_logits_of_the_model_are_not_written_to():
    logits = torch.ones(1, 6, VOCAB_SIZE)
    run([[1, 2]], SamplingConfig(num_tokens=4, num_steps=2, temperature=0.5), lambda _tokens, _t: logits)
    assert torch.equal(logits, torch.ones_like(logits))


def expect_shares(counts: Tensor, shares: Tensor) -> None:
    """Each count within five standard deviations of its binomial."""
    num = counts.sum()
    deviation = (counts - num * shares).abs() / (num * shares * (1 - shares)).sqrt()
    assert deviation.max() < 5, f"counts {counts.tolist()}, expected {(num * shares).tolist()}"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_softmax(temperature):
    logits = torch.linspace(-2, 2, VOCAB_SIZE)
    config = SamplingConfig(num_tokens=8000, num_steps=1, temperature=temperature)
    generation = run([[]], config, lambda tokens, _t: logits.expand(*tokens.shape, -1))
    shares = (logits[:MASK].double() / temperature).softmax(0)
    expect_shares(generation.completions.flatten().bincount(minlength=MASK).double(), shares)


def test_a_temperature_near_zero_is_greedy():
    config = SamplingConfig(num_tokens=8, num_steps=4, temperature=1e-300)
    greedy = SamplingConfig(num_tokens=8, num_steps=4)
    assert torch.equal(run([[3, 1, 4]], config).completions, run([[3, 1, 4]], greedy).completions)


def test_random_remasking_keeps_uniform_pairs_whatever_the_confidence():
    """The first of two steps over 4 tokens keeps each of the 6 pairs equally often, though position 3 is most confident."""
    confident = torch.zeros(1, 4, VOCAB_SIZE)
    confident[:, 3, 7] = 50
    first: list[Tensor] = []

    def watch(state: DenoisingStep) -> None:
        if state.step == 1:
            first.append(state.tokens != MASK)

    num_rows = 3000
    config = SamplingConfig(num_tokens=4, num_steps=2, remasking="random")
    run([[]] * num_rows, config, lambda tokens, _t: confident.expand(len(tokens), -1, -1), watch)
    pairs = (first[0] * torch.tensor([1, 2, 4, 8])).sum(dim=1).bincount(minlength=16)[[3, 5, 9, 6, 10, 12]].double()
    assert pairs.sum() == num_rows
    expect_shares(pairs, torch.full((6,), 1 / 6, dtype=torch.float64))


def test_low_confidence_remasking_keeps_the_confident_predictions_first():
    logits = torch.zeros(1, 4, VOCAB_SIZE)
    logits[0, torch.arange(4), torch.tensor([5, 6, 7, 8])] = torch.tensor([2.0, 40.0, 1.0, 41.0])
    states: list[list[int]] = []
    config = SamplingConfig(num_tokens=4, num_steps=4)
    run([[]], config, lambda _tokens, _t: logits, lambda state: states.append(state.tokens[0].tolist()))
    assert states[1] == [MASK, 6, MASK, 8]
    assert states[2:] == [[5, 6, MASK, 8], [5, 6, 7, 8]]


def test_confidence_is_finer_than_float32():
    """The second position is surer by an amount that float32 probabilities cannot show."""
    logits = torch.zeros(1, 2, VOCAB_SIZE)
    logits[0, :, 5] = torch.tensor([25.0, 25.5])
    assert torch.equal(logits.softmax(2)[0, 0, 5], logits.softmax(2)[0, 1, 5])
    states: list[list[int]] = []
    run([[]], SamplingConfig(num_tokens=2, num_steps=2), lambda _tokens, _t: logits, lambda s: states.append(s.tokens[0].tolist()))
    assert states[0] == [MASK, 5]


def test_no_token_marks_what_is_open():
    """Open positions hold ordinary tokens, as under uniform noise, and a decided one holds the mask token's id."""
    tokens = torch.tensor([[MASK, 5, 6, 7], [1, 2, 3, 4]])
    is_open = torch.tensor([[False, True, True, True], [True, False, True, False]])
    logits = torch.zeros(2, 4, VOCAB_SIZE)
    logits[:, torch.arange(4), torch.tensor([8, 9, 10, 11])] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    after, still_open = unmask(SamplingConfig(num_tokens=4), rows=[0, 1]).step(tokens, is_open, logits, 2)
    assert after.tolist() == [[MASK, 5, 10, 11], [8, 2, 10, 4]]
    assert still_open.tolist() == [[False, True, False, False], [False] * 4]


def test_steps_without_a_token_are_skipped_and_said(caplog):
    with caplog.at_level("INFO"):
        generation = run([[3]], SamplingConfig(num_tokens=4, num_steps=10))
    assert generation.num_forward_passes == [4]
    assert "6 of 10 denoising steps" in caplog.text


def test_text_ends_before_the_first_eos():
    assert cut_at_end([4, 5, EOS, 6, EOS], (EOS,)) == [4, 5]
    assert cut_at_end([4, 5], (EOS,)) == [4, 5]
    generation = run([[3, 1, 4]], SamplingConfig(num_tokens=8, num_steps=8))
    assert generation.completion(0) == [7, 8, 12, 11, 7]


def test_text_ends_before_the_token_that_ends_a_reply():
    settings = SamplingConfig(num_tokens=8, num_steps=8)
    generation = generate(toy_logits, [[3, 1, 4]], settings, diffusion=DIFFUSION, eos_token_id=EOS, device="cpu", other_end_ids=(5, 12))
    assert generation.completion(0) == [7, 8]
    assert generation.completions[0, :5].tolist() == [7, 8, 12, 11, 7], "what is generated is the same"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 0}, "sampling.num_tokens is 0"),
        ({"num_steps": -1}, "sampling.num_steps is -1"),
        ({"block_size": 0}, "sampling.block_size is 0"),
        ({"temperature": -0.1}, "sampling.temperature is -0.1"),
        ({"temperature": math.nan}, "sampling.temperature is nan"),
        ({"remasking": "entropy"}, "valid: low_confidence, random"),
        ({"block_size": 5}, r"a divisor of sampling.num_tokens \(12\): 1, 2, 3, 4, 6, 12"),
        ({"block_size": 4, "num_steps": 4}, "a multiple of 3, the number of blocks of 4 tokens"),
        ({"num_tokens": 0, "temperature": -1.0}, "num_tokens is 0.*temperature is -1"),
    ],
)
def test_bad_settings(changes, message):
    config = SamplingConfig(**({"num_tokens": 12, "num_steps": 6} | changes))
    with pytest.raises(ValueError, match=message):
        run([[1]], config)


def test_bad_prompts():
    config = SamplingConfig(num_tokens=4, num_steps=4)
    with pytest.raises(ValueError, match="no prompt given"):
        run([], config)
    with pytest.raises(ValueError, match=re.escape("prompt 1 has the mask token (15) at position 2")):
        run([[1], [1, 2, MASK]], config)
