"""Masks of an exact number of tokens: counts, shares, uniformity, and the estimate that they make better."""

import math

import pytest
import torch

from tests.tiny import packed_batch
from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.diffusion.corruption import corrupt, corrupt_at
from w1train.diffusion.exact_counts import noise_exactly

EXACT = {"mask_count": "exact", "t_min": 0.0, "random_length_probability": 0.0}


def _documents(num_samples, length, num_prompt=0):
    tokens = torch.randint(16, 90, (num_samples, length), generator=torch.Generator().manual_seed(2))
    batch = PackedBatch(tokens, torch.zeros((num_samples, length), dtype=torch.int32), torch.zeros_like(tokens), torch.arange(num_samples))
    batch.may_be_noised[:, :num_prompt] = False
    return batch


def test_counts_by_hand():
    can = torch.tensor([[True, True, False, True, True, False]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 2]])
    words = torch.tensor([[9, 3, 1, 5, 5, 0]])
    noised, shares = noise_exactly(can, segments, torch.tensor([[0.3, 0.2, 0.7]], dtype=torch.float64), words)
    assert noised.tolist() == [[False, True, False, True, False, False]], "the smallest word of each segment, and the first of equal words"
    assert shares.tolist() == [[0.5, 0.5, 0.7]]
    everything, _ = noise_exactly(can, segments, torch.ones((1, 3), dtype=torch.float64), words)
    assert torch.equal(everything, can)


@pytest.mark.parametrize("timestep_per", ["sequence", "document", "block"])
@pytest.mark.parametrize("shift", [False, True])
def test_the_share_of_masks_is_the_t_of_the_loss(timestep_per, shift):
    config = DiffusionConfig(**EXACT, timestep_per=timestep_per, shift=shift, block_size=8, num_strata=8)
    batch = packed_batch(range(24))
    batch.may_be_noised[::2, :9] = False
    batch.tokens[5, 7] = config.mask_token_id
    noisy = corrupt(batch, config, seed=4)
    for row in range(24):
        can = noisy.has_target[row] & (noisy.targets[row] != config.mask_token_id)
        for segment in noisy.target_segments[row][can].unique():
            here = can & (noisy.target_segments[row] == segment)
            masked = here & noisy.loss_mask[row]
            assert int(masked.sum()) >= 1
            torch.testing.assert_close(noisy.target_timesteps[row][here], torch.full((int(here.sum()),), float(masked.sum() / here.sum())))


def test_counts_are_uniform_and_so_are_the_places():
    config = DiffusionConfig(**EXACT, num_strata=64)
    noisy = corrupt(_documents(4096, 12, num_prompt=4), config, seed=1)
    counts = noisy.loss_mask.sum(dim=1).bincount(minlength=9)
    assert counts[0] == 0
    assert (counts[1:] - 512).abs().max() <= 8, "stratified draws leave almost nothing to chance"
    places = noisy.loss_mask[noisy.loss_mask.sum(dim=1) == 3].double().mean(dim=0)
    assert (places[:4] == 0).all()
    assert (places[4:] - 3 / 8).abs().max() < 5 * math.sqrt(3 / 8 * 5 / 8 / 512)


def test_the_estimate_is_unbiased_and_varies_less():
    """A model without context has the exact likelihood as its bound; what is left is the variance of the masks."""
    batch, spread = _documents(4096, 16), {}
    cost = torch.rand(96, generator=torch.Generator().manual_seed(3))[batch.tokens].double() + 1
    for count in ("random", "exact"):
        config = DiffusionConfig(**{**EXACT, "mask_count": count, "t_min": 0.0 if count == "exact" else 1e-3}, num_strata=1)
        noisy = corrupt(batch, config, seed=5)
        estimates = (noisy.loss_mask * cost / noisy.target_timesteps.double()).sum(dim=1)
        error = estimates - cost.sum(dim=1)
        spread[count] = float(error.std())
        assert abs(float(error.mean())) < 4 * spread[count] / 64
    assert spread["exact"] < 0.2 * spread["random"]


def test_the_same_in_any_batch_and_random_in_validation():
    config = DiffusionConfig(**EXACT, num_strata=8)
    whole, alone = corrupt(packed_batch(range(6)), config, seed=4), corrupt(packed_batch([3]), config, seed=4)
    assert torch.equal(whole.input_ids[3], alone.input_ids[0])
    at = [corrupt_at(packed_batch(range(6)), DiffusionConfig(mask_count=count), 0, 0.4, draw=1) for count in ("random", "exact")]
    assert torch.equal(at[0].input_ids, at[1].input_ids)


def test_a_sample_of_prompts_has_no_loss():
    batch = _documents(2, 8)
    batch.may_be_noised[1] = False
    noisy = corrupt(batch, DiffusionConfig(**EXACT), seed=1)
    assert not noisy.loss_mask[1].any()
    assert noisy.target_timesteps.isfinite().all()
