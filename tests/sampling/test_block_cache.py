"""Decoding with cached blocks against the forward pass of training, over real models of one process."""

import pytest
import torch

from tests.distributed import run_distributed
from tests.tiny import VOCAB_SIZE, tiny_config
from w1train.config.schema import DiffusionConfig, SamplingConfig
from w1train.config.schema_model import ExpertsConfig
from w1train.runtime.megatron_on_cpu import import_megatron
from w1train.sampling.denoise import generate

import_megatron()

from w1train.attention.attention_plan import plan_attention  # noqa: E402
from w1train.attention.cache import KeyValueCache, cached_visibility  # noqa: E402
from w1train.attention.visibility import Visibility, block_diffusion_visibility  # noqa: E402
from w1train.diffusion.corruption import NoisyBatch  # noqa: E402
from w1train.engine.building import build_stage  # noqa: E402
from w1train.inference.predictor import BlockPredictor, Predictor, block_predictor  # noqa: E402
from w1train.model.megatron_config import transformer_config  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402

BLOCK_SIZE = 8
MASK = 14
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def in_one_process(config, body):
    """Run ``body(predictor)`` over the configuration's model in a forked world of one."""

    def run(_rank, _size):
        with distributed(config.parallel):
            return body(Predictor(config, [_awake(config)]))

    return run_distributed(run, 1, timeout=60, process_group=False)[0]


def _awake(config):
    """Open gates, and weights large enough for logits of order one: otherwise a wrong key would be lost in the tolerance."""
    model = build_stage(config, transformer_config(config.model, config.parallel, "fp32")).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def block_config(diffusion=(), **sections):
    """``tiny_config`` of block diffusion."""
    return tiny_config(diffusion={"block_size": BLOCK_SIZE, "timestep_per": "block", **dict(diffusion)}, **sections)


def training_logits(predictor: Predictor, clean: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """[b, l, v] of the noisy stream, in one pass over [x_t ; x_0] made as training makes it.

    clean, noisy: int64 [b, l]; t: float32 [b, blocks].
    """
    num_rows, length = clean.shape
    position = torch.arange(length).expand(num_rows, length)
    segment = position // BLOCK_SIZE + torch.arange(num_rows)[:, None] * t.shape[1]
    everywhere = torch.ones_like(clean, dtype=torch.bool)
    batch = NoisyBatch(
        input_ids=noisy,
        tokens=clean,
        targets=clean,
        target_inputs=noisy,
        target_is_noised=everywhere,
        loss_mask=everywhere,
        has_target=everywhere,
        target_timesteps=torch.zeros(clean.shape),
        target_segments=torch.zeros_like(clean),
        next_targets=None,
        next_mask=None,
        document_ids=torch.zeros(clean.shape, dtype=torch.int32),
        positions=position.int(),
        places=position,
        segment_index=segment,
        segment_timesteps=t.flatten(),
        sample_indices=torch.arange(num_rows),
    )
    with torch.no_grad():
        return predictor.chunks[0](rank_inputs(batch, predictor.config).model).reshape(num_rows, length, -1)


def random_canvas(num_rows: int, length: int):
    """(clean, noisy, t): every block masked at its own share."""
    generator = torch.Generator().manual_seed(length)
    clean = torch.randint(16, VOCAB_SIZE, (num_rows, length), generator=generator)
    t = torch.rand((num_rows, -(-length // BLOCK_SIZE)), generator=generator)
    masked = torch.rand(clean.shape, generator=generator) < t.repeat_interleave(BLOCK_SIZE, dim=1)[:, :length]
    return clean, clean.masked_fill(masked, MASK), t


VARIANTS = [
    {},
    {"model": {"qk_norm": True, "num_query_groups": 2}},
    {"model": {"conditioning": "none", "num_query_groups": 1, "tie_embeddings": True}},
    {"diffusion": {"clean_attention": "token_causal"}},
    {"diffusion": {"clean_attention": "token_causal", "noisy_attention": "causal"}},
    {"diffusion": {"noisy_attention": "causal"}},
    {"diffusion": {"block_index": "sample"}},
    {"model": {"experts": ExpertsConfig(num_experts=8, num_active=2, ffn_hidden_size=16, shared_ffn_hidden_size=16)}},
    {"model": {"experts": ExpertsConfig(num_experts=8, num_active=2, ffn_hidden_size=16, pool_per_block=3)}},
]


@pytest.mark.parametrize("sections", VARIANTS, ids=str)
@pytest.mark.parametrize("length", [3 * BLOCK_SIZE, 4 * BLOCK_SIZE + 5])
def test_cached_blocks_equal_the_training_mask(sections, length):
    """All blocks; each is asked twice, as by two denoising steps, with something else in between."""
    clean, noisy, t = random_canvas(3, length)

    def body(predictor):
        blocks = block_predictor(predictor)
        blocks.start(length, BLOCK_SIZE)
        found = []
        for block, start in enumerate(range(0, length, BLOCK_SIZE)):
            part = slice(start, start + BLOCK_SIZE)
            blocks.predict_block(torch.full_like(noisy[:, part], 77), t[:, block])
            found.append(blocks.predict_block(noisy[:, part], t[:, block]))
            if start + BLOCK_SIZE <= length:
                blocks.append(clean[:, part])
        return torch.cat(found, dim=1), training_logits(predictor, clean, noisy, t)

    found, expected = in_one_process(block_config(**sections), body)
    assert expected[expected.isfinite()].std() > 0.3
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("prompt_length", [0, 3, BLOCK_SIZE, 2 * BLOCK_SIZE + 5])
def test_generation_reads_what_training_shows(prompt_length):
    """Every pass of a generation, by the tokens it was given: the prompt's whole blocks come as one clean pass, the rest of it stands
    unmasked in the first noisy block, and t is the block's share of masks."""
    num_tokens = 2 * BLOCK_SIZE + 3
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(16, VOCAB_SIZE, (2, prompt_length), generator=generator)
    config = SamplingConfig(num_tokens=num_tokens, num_steps=num_tokens)

    def body(predictor):
        recorder = Recorder(block_predictor(predictor))
        generation = generate(
            recorder, prompts, config, diffusion=DiffusionConfig(mask_token_id=MASK), eos_token_id=VOCAB_SIZE + 1, device="cpu"
        )
        canvas = torch.cat([prompts, generation.completions], dim=1)
        num_blocks = -(-canvas.shape[1] // BLOCK_SIZE)
        for start, tokens, t, logits in recorder.passes:
            assert torch.equal(t, (tokens == MASK).float().mean(dim=1))
            noisy = torch.full_like(canvas, 50)  # what other noisy blocks hold is not seen
            noisy[:, start : start + tokens.shape[1]] = tokens
            expected = training_logits(predictor, canvas, noisy, t[:, None].expand(-1, num_blocks))
            torch.testing.assert_close(logits, expected[:, start : start + tokens.shape[1]], **TOLERANCE)
        return [start for start, *_ in recorder.passes], recorder.appended, generation.num_forward_passes

    starts, appended, num_passes = in_one_process(block_config(), body)
    first = prompt_length // BLOCK_SIZE * BLOCK_SIZE
    length = prompt_length + num_tokens
    assert sorted(set(starts)) == list(range(first, length, BLOCK_SIZE))
    assert len(starts) == num_tokens
    assert sum(appended) == max(starts)
    assert appended[:1] == ([first] if first else appended[:1])
    assert num_passes == [len(starts) + len(appended)] * 2


class Recorder:
    """A block predictor that writes down its noisy passes."""

    def __init__(self, blocks: BlockPredictor) -> None:
        self.blocks, self.block_size = blocks, blocks.block_size
        self.start, self.select_rows = blocks.start, blocks.select_rows
        self.passes, self.appended = [], []

    def append(self, tokens):
        self.blocks.append(tokens)
        self.appended.append(tokens.shape[1])

    def predict_block(self, tokens, t):
        logits = self.blocks.predict_block(tokens, t)
        self.passes.append((sum(self.appended), tokens.clone(), t, logits))
        return logits


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({"num_steps": 20}, marks=pytest.mark.slow),
        pytest.param({"num_steps": 10, "temperature": 1.0}, marks=pytest.mark.slow),
        pytest.param({"num_steps": 10, "temperature": 0.7, "remasking": "random"}, marks=pytest.mark.slow),
        pytest.param({"threshold": 0.3}, marks=pytest.mark.slow),
        {"threshold": 0.1, "temperature": 1.0},
        {"num_steps": 10, "block_size": 4, "remasking": "random"},
    ],
    ids=str,
)
def test_a_batch_equals_one_by_one_and_repeats(sampling):
    """Also when rows end at different blocks, and unmask different numbers of tokens."""
    config = SamplingConfig(num_tokens=20, **sampling)
    prompts = [[20, 30, 40], [70, 21, 35], [90, 91, 92], [33, 17, 60], [18] * 9, [77] * 9]

    def body(predictor):
        blocks = block_predictor(predictor)

        def run(prompts, eos):
            return generate(
                blocks, prompts, config, diffusion=DiffusionConfig(mask_token_id=MASK), eos_token_id=eos, device="cpu", vocab_size=40
            )

        # What the first row begins with ends the text, so that it leaves the batch before the others.
        eos = int(run(prompts, 99).completions[0, 0])
        whole = run(prompts, eos)
        alone = [run([*[[16]] * row, prompt], eos) for row, prompt in enumerate(prompts)]
        assert torch.equal(run(prompts, eos).completions, whole.completions)
        return whole, [(each.completions[-1], each.num_forward_passes[-1]) for each in alone]

    whole, alone = in_one_process(block_config(), body)
    assert not (whole.completions == MASK).any()
    assert whole.completions.max() < 40
    has_ended = (whole.completions[:4, 5:] == whole.eos_token_id).all(dim=1)
    assert has_ended[0]
    assert not has_ended.all()
    for row, (completion, num_passes) in enumerate(alone):
        assert torch.equal(whole.completions[row], completion)
        assert whole.num_forward_passes[row] == num_passes


@pytest.mark.parametrize("clean_attention", ["block_causal", "token_causal"])
def test_blocks_can_be_appended_together_or_one_by_one(clean_attention):
    clean, noisy, t = random_canvas(2, 3 * BLOCK_SIZE)

    def body(predictor):
        results = []
        for sizes in ([16], [8, 8]):
            blocks = block_predictor(predictor)
            blocks.start(24, BLOCK_SIZE)
            for part in clean[:, :16].split(sizes, dim=1):
                blocks.append(part)
            results.append(blocks.predict_block(noisy[:, 16:], t[:, 2]))
        return results

    together, one_by_one = in_one_process(block_config({"clean_attention": clean_attention}), body)
    torch.testing.assert_close(together, one_by_one, **TOLERANCE)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    "attention", [{}, {"clean_attention": "token_causal"}, {"clean_attention": "token_causal", "noisy_attention": "causal"}], ids=str
)
def test_the_shift_takes_each_token_from_the_place_before(attention, at_once):
    """The first of a block from the last of the block before, which stands without a mask at t = 0, as training may show it."""
    length = 2 * BLOCK_SIZE + 3
    clean, noisy, t = random_canvas(3, length)

    def body(predictor):
        blocks = block_predictor(predictor)
        blocks.start(length, BLOCK_SIZE)
        found, expected = [], []
        for block, start in enumerate(range(0, length, BLOCK_SIZE)):
            part = slice(start, start + BLOCK_SIZE)
            found.append(blocks.predict_block(noisy[:, part], t[:, block]))
            shown, times = clean.clone(), torch.zeros_like(t)
            shown[:, part], times[:, block] = noisy[:, part], t[:, block]
            before = [max(place - 1, 0) for place in range(length)[part]]
            expected.append(training_logits(predictor, clean, shown, times)[:, before])
            if block < 2:
                blocks.append(clean[:, part])
        if at_once:
            # A prompt of several blocks.
            blocks.start(length, BLOCK_SIZE)
            blocks.append(clean[:, : 2 * BLOCK_SIZE])
            found[2] = blocks.predict_block(noisy[:, 2 * BLOCK_SIZE :], t[:, 2])
        blocks.select_rows(torch.tensor([2, 0]))
        fewer = blocks.predict_block(noisy[[2, 0], 16:], t[[2, 0], 2])
        whole_canvas = predictor(clean, torch.tensor([0.1, 0.5, 0.9]))
        predictor.config.diffusion.shift = False
        unshifted = predictor(clean, torch.tensor([0.1, 0.5, 0.9]))
        return torch.cat(found, dim=1), torch.cat(expected, dim=1), fewer, whole_canvas, unshifted

    found, expected, fewer, whole_canvas, unshifted = in_one_process(block_config({"shift": True, **attention}), body)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    torch.testing.assert_close(fewer, expected[[2, 0], 16:], **TOLERANCE)
    assert torch.equal(whole_canvas[:, 1:], unshifted[:, :-1])


def test_a_new_start_forgets_the_rows_before():
    """Neither keys nor, with a shift, the last output of a text reach the next one, which may have no prompt."""
    clean, noisy, t = random_canvas(2, 2 * BLOCK_SIZE)

    def body(predictor):
        results = []
        for has_been_used in (False, True):
            blocks = block_predictor(predictor)
            if has_been_used:
                blocks.start(2 * BLOCK_SIZE, BLOCK_SIZE)
                blocks.append(clean[:, :BLOCK_SIZE])
                blocks.predict_block(noisy[:, BLOCK_SIZE:], t[:, 1])
            blocks.start(2 * BLOCK_SIZE, BLOCK_SIZE)
            results.append(blocks.predict_block(noisy[:, :BLOCK_SIZE], t[:, 0]))
        return results

    fresh, used = in_one_process(block_config({"shift": True}), body)
    assert torch.equal(fresh, used)


def test_visibility_of_a_pass_is_that_of_training():
    """Clean and noisy passes, block by block, are the rows of the two-stream mask."""
    length, block_size = 22, 5
    training = block_diffusion_visibility(torch.zeros((1, length), dtype=torch.int32), block_size, "document").dense()[0]
    for start in range(0, length, block_size):
        end = min(start + block_size, length)
        seen = cached_visibility(start, end - start, block_size, "block", num_rows=end - start + 2, device="cpu").dense()[0]
        noisy = torch.cat([training[start:end, length : length + start], training[start:end, start:end]], dim=1)
        assert torch.equal(seen[: end - start, :end], noisy)
        assert torch.equal(seen[: end - start, :end], training[length + start : length + end, length : length + end])
        assert not seen[end - start :].any()
        assert not seen[:, end:].any()
    whole = cached_visibility(0, length, block_size, "block", num_rows=length, device="cpu").dense()[0]
    assert torch.equal(whole, training[length:, length:])
    causal = cached_visibility(3, 4, block_size, "token", num_rows=4, device="cpu").dense()[0]
    assert torch.equal(causal, torch.ones((4, 7), dtype=torch.bool).tril(3))


def test_what_is_not_kept_is_overwritten():
    cache = KeyValueCache(capacity=4)
    first, second, third = (torch.full((2, 3, 1, 2), number) for number in (1.0, 2.0, 3.0))
    cache.extend(1, first, first)
    keys, values = cache.extend(1, second, -second)
    assert torch.equal(keys, second)
    cache.keep(2)
    keys, values = cache.extend(1, third, -third)
    assert torch.equal(keys, torch.cat([second, third]))
    assert torch.equal(values, -keys)
    with pytest.raises(AssertionError):
        cache.extend(1, torch.zeros(3, 3, 1, 2), torch.zeros(3, 3, 1, 2))


def test_the_cache_goes_on_with_the_chosen_samples():
    cache = KeyValueCache(capacity=3)
    keys = torch.arange(3.0).reshape(1, 3, 1, 1)
    for layer in (1, 2):
        cache.extend(layer, keys + layer, -keys)
    cache.keep(1)
    cache.select_samples(torch.tensor([2, 0]))
    for layer in (1, 2):
        found_keys, found_values = cache.extend(layer, torch.tensor([[[[7.0]], [[8.0]]]]), torch.zeros(1, 2, 1, 1))
        assert found_keys[..., 0, 0].tolist() == [[2 + layer, layer], [7, 8]]
        assert found_values[..., 0, 0].tolist() == [[-2, 0], [0, 0]]


def test_a_plan_with_a_cache_keeps_it_masked_or_not():
    cache = KeyValueCache(4)
    assert plan_attention(Visibility(torch.full((1, 1, 2), 4, dtype=torch.int32), 4), cache=cache).cache is cache
    assert plan_attention(Visibility(torch.full((1, 1, 2), 3, dtype=torch.int32), 4), cache=cache).cache is cache


def test_only_block_diffusion_has_blocks():
    for block_size, expected in ((None, False), (BLOCK_SIZE, True), (32, False)):
        config = tiny_config(diffusion={"block_size": block_size})
        assert (block_predictor(Predictor(config, [])) is not None) is expected
