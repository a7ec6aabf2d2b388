"""Block diffusion through the model: what a position can know, and the two ends, autoregression and masked diffusion."""

import pytest
import torch

from tests.model.test_transformer import _awake, single_process
from tests.tiny import LENGTH, VOCAB_SIZE, packed_batch, tiny_config
from w1train.data.batch import PackedBatch
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.attention.attention_plan import plan_attention  # noqa: E402
from w1train.attention.visibility import causal_visibility  # noqa: E402
from w1train.data.documents import block_bounds  # noqa: E402
from w1train.diffusion.corruption import corrupt, corrupt_at  # noqa: E402
from w1train.model.transformer import ModelInputs  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402

VARIANTS = [
    {"block_index": "document"},
    {"block_index": "sample"},
    {"clean_attention": "token_causal"},
    {"clean_attention": "token_causal", "noisy_attention": "causal", "shift": True},
]


def _config(**diffusion):
    return tiny_config(model={"qk_norm": True}, diffusion={"random_length_probability": 0.0, "block_size": 8, **diffusion})


def _outputs(model, config, noisy):
    """Logits of both streams at every position, [b, l, v] each."""
    inputs = rank_inputs(noisy, config).model
    inputs.logit_positions = torch.arange(inputs.input_ids.numel())
    with torch.no_grad():
        logits = model(inputs)
    return logits.reshape(len(noisy.tokens), 2, -1, VOCAB_SIZE).unbind(1)


def _other(tokens):
    return (tokens - 16 + 7) % (VOCAB_SIZE - 16) + 16


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_who_learns_of_whom(variant):
    """If one token of a stream changes, the outputs that may depend on it change, and every other output keeps its bits."""

    @single_process
    def body():
        config = _config(**variant)
        model = _awake(config)
        noisy = corrupt(packed_batch([1, 2]), config.diffusion, 0)
        before = _outputs(model, config, noisy)
        documents = noisy.document_ids
        block_start, block_end = block_bounds(documents, 8, config.diffusion.block_index)
        place = torch.arange(LENGTH)
        causal_noisy = config.diffusion.noisy_attention == "causal"
        causal_clean = config.diffusion.clean_attention == "token_causal"
        for changed in range(0, LENGTH, 3):
            same = (documents == documents[:, changed : changed + 1]) & (documents >= 0)
            own_block = same & (block_start == block_start[:, changed : changed + 1])
            later_block = same & (block_start >= block_end[:, changed : changed + 1])
            behind = same & (place >= changed)
            # Padding attends to nothing; what it computes is its own.
            itself = (documents < 0) & (place == changed)
            # A token of the noisy stream: its own noisy block, and nothing of the clean stream.
            kept = noisy.input_ids.clone()
            noisy.input_ids[:, changed] = _other(kept[:, changed])
            after = _outputs(model, config, noisy)
            noisy.input_ids = kept
            _require_changed(before[0], after[0], itself | (own_block & behind if causal_noisy else own_block))
            _require_changed(before[1], after[1], torch.zeros_like(same))
            # A token of the clean stream: later noisy blocks, strictly, and the clean stream from its block (or itself) on.
            kept = noisy.tokens.clone()
            noisy.tokens[:, changed] = _other(kept[:, changed])
            after = _outputs(model, config, noisy)
            noisy.tokens = kept
            _require_changed(before[0], after[0], later_block)
            _require_changed(before[1], after[1], itself | (behind if causal_clean else own_block | later_block))

    body()


def _require_changed(before, after, expected):
    changed = (before != after).any(dim=-1)
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_pack_equals_its_documents_one_by_one(variant):
    """Losses and gradients, with the blocks counted from each document (or from a document that begins the sample)."""

    @single_process
    def body():
        config = _config(**variant)
        model = _awake(config)
        if config.diffusion.block_index == "sample":
            # Starts at multiples of the block size: there the two ways of counting agree.
            documents = torch.tensor([[0] * 8 + [1] * 16 + [2] * 8], dtype=torch.int32)
        else:
            documents = torch.tensor([[0] * 5 + [1] * 17 + [2] * 10], dtype=torch.int32)
        tokens = packed_batch([4]).tokens
        positions = torch.cat([torch.arange(int((documents == document).sum())) for document in range(3)])[None].int()
        noisy = corrupt_at(PackedBatch(tokens, documents, positions, torch.tensor([4])), config.diffusion, 0, 0.6, draw=1)
        packed = _gradients(model, config, [noisy])
        alone = [_only(noisy, document, config) for document in range(3)]
        for (name, gradient), expected in zip(packed.items(), _gradients(model, config, alone).values(), strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-7, msg=name)

    body()


def _gradients(model, config, batches):
    model.zero_grad()
    for noisy in batches:
        logits = model(rank_inputs(noisy, config).model)
        torch.nn.functional.cross_entropy(logits, noisy.targets[noisy.loss_mask], reduction="sum").backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _only(noisy, document, config):
    """One document's part of a noisy batch, as a sample of its own, filled up with padding."""
    places = (noisy.document_ids[0] == document).nonzero()[:, 0]
    filled = torch.cat([places, places.new_zeros(LENGTH - len(places))])
    real = torch.arange(LENGTH)[None] < len(places)
    alone = noisy.at(filled[None])
    alone.document_ids = torch.where(real, 0, -1).int()
    alone.loss_mask = alone.loss_mask & real
    return alone


@pytest.mark.parametrize("clean_attention", ["block_causal", "token_causal"])
def test_block_size_one_with_everything_masked_is_autoregression(clean_attention):
    """Each position is predicted from a mask token and the clean tokens before it, as by one causal pass over (x_<p, [MASK])
    for each p."""

    @single_process
    def body():
        config = _config(block_size=1, clean_attention=clean_attention)
        model = _awake(config)
        noisy = corrupt_at(packed_batch([0]), config.diffusion, 0, 1.0, draw=1)
        assert noisy.loss_mask.all()
        with torch.no_grad():
            logits = model(rank_inputs(noisy, config).model)
        for place in range(LENGTH):
            start = place - int(noisy.positions[0, place])
            length = place - start + 1
            prefix = noisy.tokens[:, start : place + 1].clone()
            prefix[0, -1] = config.diffusion.mask_token_id
            inputs = ModelInputs(
                input_ids=prefix,
                positions=torch.arange(length)[None],
                attention_plan=plan_attention(causal_visibility(torch.zeros((1, length), dtype=torch.int32))),
                # Clean tokens are at t = 0, the masked one is at t = 1.
                segment_timesteps=torch.tensor([0.0, 1.0]),
                segment_index=torch.tensor([[0] * (length - 1) + [1]]),
                logit_positions=torch.tensor([length - 1]),
            )
            with torch.no_grad():
                torch.testing.assert_close(model(inputs)[0], logits[place], rtol=1e-5, atol=1e-5)

    body()


def test_one_block_is_masked_diffusion_and_computes_no_clean_stream():
    @single_process
    def body():
        blocks, masked = _config(block_size=LENGTH), _config(block_size=None)
        model = _awake(masked)
        noisy = corrupt(packed_batch(range(3)), masked.diffusion, 0)
        inputs = rank_inputs(noisy, blocks).model
        assert inputs.input_ids.shape == (3, LENGTH)
        with torch.no_grad():
            assert torch.equal(model(inputs), model(rank_inputs(noisy, masked).model))

    body()


def test_a_block_as_long_as_the_sample_leaves_the_clean_stream_inert():
    """The same through two streams, as if they were computed: no output of the noisy one depends on a clean token."""

    @single_process
    def body():
        config = _config(block_size=LENGTH // 2)
        model = _awake(config)
        noisy = corrupt(packed_batch([0]), config.diffusion, 0)
        noisy.document_ids = torch.tensor([[0] * (LENGTH // 2) + [-1] * (LENGTH // 2)], dtype=torch.int32)
        before, _ = _outputs(model, config, noisy)
        noisy.tokens = _other(noisy.tokens)
        after, _ = _outputs(model, config, noisy)
        assert torch.equal(before, after)

    body()
