"""Corruption of packed batches: rates, purity, and no trace of the targets in what the model sees."""

import pytest
import torch

from tests.tiny import packed_batch
from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.diffusion.corruption import corrupt, corrupt_at, cut_to_random_length

CONFIG = DiffusionConfig(random_length_probability=0.0, num_strata=8)


def test_masks_at_rate_t_and_nothing_else_changes():
    batch = packed_batch(range(512))
    noisy = corrupt(batch, CONFIG, seed=5)
    real = batch.document_ids >= 0
    assert torch.equal(noisy.targets, batch.tokens)
    assert torch.equal(noisy.input_ids == CONFIG.mask_token_id, noisy.loss_mask)
    assert torch.equal(noisy.input_ids[~noisy.loss_mask], batch.tokens[~noisy.loss_mask])
    assert not noisy.loss_mask[~real].any()
    rate = noisy.loss_mask[real].double().mean()
    expected = noisy.target_timesteps[real].double().mean()
    assert abs(rate - expected) < 0.01
    for low in (0.0, 0.25, 0.5, 0.75):
        chosen = real & (noisy.target_timesteps >= low) & (noisy.target_timesteps < low + 0.25)
        assert abs(noisy.loss_mask[chosen].double().mean() - noisy.target_timesteps[chosen].double().mean()) < 0.03


def test_masked_inputs_carry_no_trace_of_the_targets():
    """The same noise over other tokens: where a loss is taken, the input is the same; the mask itself does not move."""
    batch, other = packed_batch(range(64)), packed_batch(range(64))
    other.tokens = torch.randint(16, 96, other.tokens.shape)
    first, second = corrupt(batch, CONFIG, seed=5), corrupt(other, CONFIG, seed=5)
    assert torch.equal(first.loss_mask, second.loss_mask)
    assert torch.equal(first.input_ids[first.loss_mask], second.input_ids[second.loss_mask])
    assert torch.equal(first.segment_timesteps, second.segment_timesteps)


@pytest.mark.parametrize("timestep_per", ["sequence", "document"])
def test_the_same_whatever_the_micro_batches(timestep_per):
    config = DiffusionConfig(timestep_per=timestep_per, num_strata=8, random_length_probability=0.2)
    whole = corrupt(packed_batch(range(24)), config, seed=9)
    for size in (1, 3, 8):
        parts = [corrupt(packed_batch(range(start, start + size)), config, seed=9) for start in range(0, 24, size)]
        for name in ("input_ids", "loss_mask", "target_timesteps", "document_ids"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name


def test_documents_get_their_own_timestep():
    config = DiffusionConfig(timestep_per="document", num_strata=8, random_length_probability=0.0)
    noisy = corrupt(packed_batch(range(16)), config, seed=1)
    assert torch.equal(noisy.target_timesteps, noisy.segment_timesteps[noisy.segment_index])
    for row in range(16):
        documents = noisy.document_ids[row]
        per_document = [noisy.target_timesteps[row][documents == document].unique() for document in documents[documents >= 0].unique()]
        assert all(len(values) == 1 for values in per_document)
        assert len({float(values) for values in per_document}) == len(per_document)


def test_random_length_cuts_the_stated_share_uniformly():
    length = 64
    documents = torch.zeros((20_000, length), dtype=torch.int32)
    batch = PackedBatch(documents.long(), documents, documents, torch.arange(20_000))
    cut = cut_to_random_length(batch, DiffusionConfig(random_length_probability=0.1), 2, batch.sample_indices)
    kept = (cut.document_ids >= 0).sum(dim=1)
    assert (kept >= 1).all()
    assert abs(float((kept < length).double().mean()) - 0.1 * 63 / 64) < 0.01
    assert abs(float(kept[kept < length].double().mean()) - 32) < 1.5
    assert ((cut.document_ids >= 0).long().diff(dim=1) <= 0).all(), "what is kept is a prefix"


def test_a_mask_token_in_the_data_is_never_a_target():
    """Its logit is excluded from the softmax, so a loss there would be infinite."""
    batch = packed_batch(range(8))
    batch.tokens[:, ::2] = CONFIG.mask_token_id
    noisy = corrupt_at(batch, CONFIG, seed=0, timestep=1.0, draw=1)
    assert not noisy.loss_mask[:, ::2].any()
    assert noisy.loss_mask[:, 1::2].any()
