"""Text filled in between a prompt and a suffix: what is given stays and is seen, and nothing else is open."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sampling.test_block_cache import MASK, VOCAB_SIZE, block_config, in_one_process
from tests.sampling.test_denoise import EOS, toy_logits
from tests.sampling.test_denoise import MASK as TOY_MASK
from tests.tiny import tiny_config
from w1train.config.errors import UserError
from w1train.config.schema import DiffusionConfig, SamplingConfig
from w1train.inference.predictor import block_predictor
from w1train.sampling.canvas import DenoisingStep
from w1train.sampling.denoise import generate

texts = st.lists(st.integers(0, TOY_MASK - 1), max_size=5)


def fill_in(prompts, suffixes, config, predict=toy_logits, on_step=None):
    return generate(
        predict,
        prompts,
        config,
        diffusion=DiffusionConfig(mask_token_id=TOY_MASK),
        eos_token_id=EOS,
        device="cpu",
        suffixes=suffixes,
        on_step=on_step,
    )


@st.composite
def infills(draw):
    num_blocks, block_size = draw(st.sampled_from([(1, 0), (1, 1), (1, 6), (2, 3), (3, 2)]))
    config = SamplingConfig(
        num_tokens=num_blocks * block_size,
        num_steps=num_blocks * draw(st.integers(1, 4)),
        block_size=block_size or None,
        temperature=draw(st.sampled_from([0.0, 1.0])),
        remasking=draw(st.sampled_from(["low_confidence", "random"])),
    )
    rows = draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
    return [prompt for prompt, _ in rows], [suffix for _, suffix in rows], config


@given(infills())
@settings(max_examples=60, deadline=None)
def test_what_is_given_stays_and_is_seen(infill):
    """Every pass reads prompt and suffix as they are, with as many masks between them as are open; t is their share of the whole text."""
    prompts, suffixes, config = infill
    states: list[DenoisingStep] = []
    passes: list[tuple[torch.Tensor, torch.Tensor]] = []

    def predict(tokens, t):
        passes.append((tokens.clone(), t))
        return toy_logits(tokens, t)

    generation = fill_in(prompts, suffixes, config, predict, states.append)
    assert generation.completions.shape == (len(prompts), config.num_tokens)
    assert not (generation.completions == TOY_MASK).any()
    assert len(passes) == len(states)
    for state, (tokens, t) in zip(states, passes, strict=True):
        for place, row in enumerate(state.rows):
            prompt, suffix = prompts[row], suffixes[row]
            end = len(prompt) + config.num_tokens
            for canvas in (tokens[place], state.tokens[place]):
                assert canvas[: len(prompt)].tolist() == prompt
                assert canvas[end:].tolist() == suffix
            is_open = state.is_open[place]
            assert not is_open[: len(prompt)].any()
            assert not is_open[end:].any()
            assert torch.equal(state.tokens[place] == TOY_MASK, is_open)
            assert state.start == len(prompt)
            assert float(t[place]) == pytest.approx(int((tokens[place] == TOY_MASK).sum()) / len(tokens[place]))
    for row in range(len(prompts)):
        of_row = [tokens[state.rows.index(row)] for state, (tokens, _) in zip(states, passes, strict=True) if row in state.rows]
        assert [int((canvas == TOY_MASK).sum()) for canvas in of_row[:1]] == [config.num_tokens][: len(of_row)]
        last = [state.tokens[state.rows.index(row)] for state in states if row in state.rows][-1:]
        assert all(canvas[len(prompts[row]) :][: config.num_tokens].tolist() == generation.completions[row].tolist() for canvas in last)


@given(infills())
@settings(max_examples=30, deadline=None)
def test_empty_suffixes_change_nothing(infill):
    prompts, _, config = infill
    if config.num_tokens:
        without = fill_in(prompts, None, config)
        assert torch.equal(fill_in(prompts, [[] for _ in prompts], config).completions, without.completions)


@given(infills())
@settings(max_examples=30, deadline=None)
def test_a_row_does_not_depend_on_the_others(infill):
    prompts, suffixes, config = infill
    assert torch.equal(fill_in(prompts, suffixes, config).completions[:1], fill_in(prompts[:1], suffixes[:1], config).completions)


def test_an_infill_of_no_tokens_takes_no_pass():
    def refuse(_tokens, _t):
        raise AssertionError("there is nothing to predict")

    generation = fill_in([[1, 2], []], [[3], []], SamplingConfig(num_tokens=0, block_size=4, threshold=0.5), refuse)
    assert generation.completions.shape == (2, 0)
    assert generation.num_forward_passes == [0, 0]
    assert [generation.completion(row) for row in range(2)] == [[], []]
    with pytest.raises(UserError, match=r"sampling\.num_tokens is 0; it must be at least 1"):
        fill_in([[1]], None, SamplingConfig(num_tokens=0))


@pytest.mark.parametrize(
    ("suffixes", "message"),
    [([[1]], "1 suffixes for 2 prompts"), ([[1], [2, TOY_MASK]], r"suffix 1 has the mask token \(15\) at position 1")],
)
def test_suffixes_that_cannot_be(suffixes, message):
    with pytest.raises(UserError, match=message):
        fill_in([[1], [2]], suffixes, SamplingConfig(num_tokens=4, num_steps=4))


@pytest.mark.parametrize("shift", [False, True])
def test_the_model_sees_the_suffix(shift):
    """Another suffix changes the logits of every open position of a real model, and what is filled in."""
    prompt, suffix, other = [20, 21, 22], [30, 31, 32, 33], [30, 31, 32, 90]
    config = SamplingConfig(num_tokens=5, num_steps=5)

    def body(predictor):
        found = []
        for text in (suffix, other):
            seen = []

            def predict(tokens, t, seen=seen):
                seen.append(predictor(tokens, t))
                return seen[-1]

            generate(
                predict,
                [prompt],
                config,
                diffusion=DiffusionConfig(mask_token_id=MASK),
                eos_token_id=VOCAB_SIZE,
                device="cpu",
                suffixes=[text],
            )
            found.append(seen[0][0, 3:8])
        return found

    first, second = in_one_process(tiny_config(diffusion={"shift": shift}), body)
    seen = first.isfinite()
    assert ((first - second).masked_fill(~seen, 0.0).abs().max(dim=1).values > 1e-3).all()


def test_a_model_of_blocks_refuses_a_suffix():
    """Its blocks do not see later ones."""

    def body(predictor):
        blocks, config = block_predictor(predictor), SamplingConfig(num_tokens=8, num_steps=8)
        with pytest.raises(UserError, match="a block does not see the blocks after it"):
            generate(
                blocks,
                [[20]],
                config,
                diffusion=DiffusionConfig(mask_token_id=MASK),
                eos_token_id=VOCAB_SIZE,
                device="cpu",
                suffixes=[[30]],
            )
        empty = generate(
            blocks, [[20]], config, diffusion=DiffusionConfig(mask_token_id=MASK), eos_token_id=VOCAB_SIZE, device="cpu", suffixes=[[]]
        )
        return empty.completions.shape

    assert in_one_process(block_config(), body) == (1, 8)
