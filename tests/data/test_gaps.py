"""Padding between documents, as data.align leaves it: nothing behind the loader takes it for text, or for the end of the text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.data.test_packing import best_fit, numbered_dataset
from tests.model.test_transformer import _awake, single_process
from tests.tiny import LENGTH, VOCAB_SIZE, tiny_config
from w1train.data.batch import PackedBatch
from w1train.data.documents import block_bounds, block_ordinals
from w1train.data.loader import collate_run
from w1train.diffusion.corruption import NoisyBatch, corrupt, corrupt_at
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.training.inputs import rank_inputs  # noqa: E402

ALIGN = 8
OBJECTIVES = {
    "one stream": {},
    "blocks": {"block_size": 8, "timestep_per": "block"},
    "blocks of the sample": {"block_size": 8, "timestep_per": "block", "block_index": "sample"},
    "blocks that are no divisor": {"block_size": 5, "timestep_per": "block"},
    "shifted": {"shift": True, "timestep_per": "document", "weight": "inverse_fraction"},
    "shifted blocks": {"block_size": 8, "shift": True, "clean_attention": "token_causal", "autoregressive_weight": 0.5},
    "autoregressive": {"objective": "autoregressive"},
}


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """Documents of 3 to 13 tokens at multiples of 8 of samples of 32."""
    dataset = numbered_dataset(tmp_path_factory.mktemp("gaps"), [3 + 7 * i % 11 for i in range(48)])
    packed = best_fit(dataset, LENGTH, 1, align=ALIGN)
    batch = collate_run(packed, packed.num_samples_per_epoch, 0)
    batch.tokens %= VOCAB_SIZE - 16
    batch.tokens += 16
    real = batch.document_ids >= 0
    inside = ~real & (real.flip(1).cumsum(1).flip(1) > 0)
    assert inside.any(dim=1).sum() > 5, "padding before documents"
    return batch


def config_of(objective):
    return tiny_config(model={"qk_norm": True}, diffusion={"random_length_probability": 0.0, **OBJECTIVES[objective]})


def test_blocks_are_counted_from_each_document_and_hold_no_padding(batch):
    start, end = block_bounds(batch.document_ids, 5, "document")
    ordinals = block_ordinals(batch.document_ids, 5, "document")
    for row, documents in enumerate(batch.document_ids.tolist()):
        for place, document in enumerate(documents):
            if document < 0:
                continue
            first, last = documents.index(document), LENGTH - documents[::-1].index(document)
            block = first + (place - first) // 5 * 5
            assert (int(start[row, place]), int(end[row, place])) == (block, min(block + 5, last))
            assert (ordinals[row] == ordinals[row, place]).nonzero()[:, 0].tolist() == list(range(block, min(block + 5, last)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_padding_is_masked_or_predicted(batch, objective):
    """Every token of a document once, or with shift and in autoregression all but its first; from a place of the same document."""
    config = config_of(objective).diffusion
    from_before = config.shift or config.objective == "autoregressive"
    noisy = corrupt_at(batch, config, seed=3, timestep=1.0, draw=0)
    real = batch.document_ids >= 0
    assert torch.equal(noisy.tokens, batch.tokens)
    assert torch.equal(noisy.input_ids[~real], batch.tokens[~real])
    assert not noisy.loss_mask[~real].any()
    assert not noisy.has_target[~real].any()
    num_documents = int((batch.document_ids.max(dim=1).values + 1).sum())
    assert int(noisy.num_tokens) == int(real.sum()) - num_documents * from_before == int(noisy.loss_mask.sum())
    for row, place in noisy.loss_mask.nonzero().tolist():
        target = place + from_before
        assert batch.document_ids[row, place] == batch.document_ids[row, target]
        assert noisy.targets[row, place] == batch.tokens[row, target]
    if noisy.next_mask is not None:
        assert int(noisy.next_mask.sum()) == int(real.sum()) - num_documents
        assert not noisy.next_mask[~real].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_in_the_padding_changes_no_loss(batch, objective):
    @single_process
    def body():
        config = config_of(objective)
        model = _awake(config)
        real = batch.document_ids >= 0
        other = PackedBatch(torch.where(real, batch.tokens, 17), batch.document_ids, batch.positions, batch.sample_indices)
        first, second = (losses(model, config, corrupt(one, config.diffusion, 5)) for one in (batch, other))
        assert len(first) > 30
        assert torch.equal(first, second)
        assert torch.isfinite(first).all()

    body()


@pytest.mark.parametrize("objective", ["one stream", "blocks", "blocks that are no divisor", "shifted", "autoregressive"])
def test_without_its_gaps_a_sample_has_the_same_losses(batch, objective):
    """The same noisy tokens moved together: what the model knows of a place is its document and its position there."""

    @single_process
    def body():
        config = config_of(objective)
        model = _awake(config)
        noisy = corrupt(batch, config.diffusion, 5)
        moved = noisy.at((batch.document_ids < 0).to(torch.int8).argsort(dim=1, stable=True))
        padding = (moved.document_ids < 0).long()
        assert (padding.diff(dim=1) >= 0).all(), "padding is a suffix now"
        torch.testing.assert_close(losses(model, config, moved), losses(model, config, noisy), rtol=1e-5, atol=1e-5)

    body()


def losses(model, config, noisy: NoisyBatch) -> torch.Tensor:
    """Of every predicted token, in the order of samples and places."""
    inputs = rank_inputs(noisy, config)
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(inputs.model), inputs.targets, reduction="none")


def test_the_batch_is_what_the_loader_says(batch):
    """Positions count from each document's beginning, over the gaps as over any border."""
    for documents, positions in zip(batch.document_ids.numpy(), batch.positions.numpy(), strict=True):
        for document in range(documents.max() + 1):
            places = np.flatnonzero(documents == document)
            assert places[0] % ALIGN == 0
            assert positions[places].tolist() == list(range(len(places)))
