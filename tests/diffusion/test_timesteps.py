"""Timesteps: uniform, stratified over the global order, untied from positions and ranks, exact in integers."""

import pytest
import torch

from tests.tiny import packed_batch
from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.diffusion.corruption import corrupt
from w1train.diffusion.process import NoiseDraw
from w1train.diffusion.timesteps import draw_fractions, timesteps_from_fractions, word_thresholds

CONFIG = DiffusionConfig(num_strata=64)


def _timesteps(first, count, config=CONFIG, num_segments=1, seed=3, draw=0):
    fractions = draw_fractions(config, seed, torch.arange(first, first + count), num_segments, draw)
    return timesteps_from_fractions(config, fractions)


@pytest.mark.parametrize("num_strata", [1, 2, 64, 512])
def test_every_aligned_group_has_one_sample_in_each_stratum(num_strata):
    config = DiffusionConfig(num_strata=num_strata, t_min=0.0)
    timesteps = _timesteps(7 * num_strata, 3 * num_strata, config)[:, 0].reshape(3, num_strata)
    strata = (timesteps * num_strata).floor().long().sort(dim=1).values
    assert torch.equal(strata, torch.arange(num_strata).expand(3, -1))


def test_each_rank_and_micro_batch_sees_the_whole_range():
    """Eight consecutive samples of 64 strata: never all from one end."""
    timesteps = _timesteps(0, 64 * 50)[:, 0].reshape(-1, 8)
    assert (timesteps.sort(dim=1).values.diff(dim=1) < 0.27).all()
    assert (timesteps.amin(dim=1) < 0.26).all()


def test_uniform_at_every_place_of_the_batch():
    """Antithetic strata that are tied to the place in the batch would give each place its own t for ever."""
    by_place = _timesteps(0, 64 * 4000, DiffusionConfig(t_min=0.0))[:, 0].reshape(4000, 64)
    assert (by_place.mean(dim=0) - 0.5).abs().max() < 0.03  # sd of a mean of 4000 uniforms: 0.0046
    assert (by_place.std(dim=0) - 12**-0.5).abs().max() < 0.02
    counts = torch.histc(by_place.float(), bins=100, min=0, max=1)
    assert ((counts - 2560) / 2560).abs().max() < 0.05


def test_independent_of_the_batch_and_of_other_draws():
    whole = _timesteps(0, 128)
    assert torch.equal(whole[37:41], _timesteps(37, 4))
    assert not torch.equal(whole, _timesteps(0, 128, seed=4))
    assert not torch.equal(whole, _timesteps(0, 128, draw=1))


def test_documents_of_a_sample_are_uniform_and_spread():
    timesteps = _timesteps(0, 64 * 500, num_segments=5)
    assert (timesteps.mean(dim=0) - 0.5).abs().max() < 0.01
    gaps = timesteps.sort(dim=1).values.diff(dim=1)
    assert gaps.max() < 0.6  # independent draws would leave gaps of 0.9


def test_range_and_thresholds():
    config = DiffusionConfig(t_min=0.3, t_max=0.8)
    timesteps = _timesteps(0, 1000, config)
    assert timesteps.min() >= 0.3
    assert timesteps.max() < 0.8
    assert word_thresholds(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 2**31, 2**32]


@pytest.mark.parametrize("timestep_per", ["sequence", "document"])
def test_an_antithetic_pair_is_at_u_and_one_minus_u_and_has_noise_of_its_own(timestep_per):
    config = DiffusionConfig(antithetic=True, t_min=0.2, t_max=0.9, num_strata=8, timestep_per=timestep_per, random_length_probability=0.0)
    indices = torch.arange(32)
    tokens = torch.full((32, 64), 20)
    documents = (torch.arange(64) >= 40).int().expand(32, -1).contiguous()
    noisy = corrupt(PackedBatch(tokens, documents, documents, indices), config, seed=3)
    first, second = noisy.target_timesteps[::2], noisy.target_timesteps[1::2]
    torch.testing.assert_close(first + second, torch.full_like(first, 1.1), rtol=1e-6, atol=0)
    assert (first - second).abs().max() > 0.5
    masked = noisy.input_ids != tokens
    both = masked[::2] & masked[1::2]
    assert 0.1 < both.float().mean() < 0.4, "masks are neither complements nor the same"
    strata = ((noisy.target_timesteps[:16:2, 0] - 0.2) / 0.7 * 8).floor().long()
    assert sorted(strata.tolist()) == list(range(8)), "pairs are stratified"


@pytest.mark.parametrize("is_antithetic", [False, True])
def test_discrete_time_has_each_step_equally_often(is_antithetic):
    config = DiffusionConfig(num_timesteps=8, num_strata=8, antithetic=is_antithetic, random_length_probability=0.0)
    timesteps = NoiseDraw(5, torch.arange(64)).segment_timesteps(packed_batch(range(64)), config)[1][:, 0]
    steps = (timesteps * 8).round()
    assert torch.equal(steps / 8, timesteps)
    assert torch.bincount(steps.long(), minlength=9).tolist() == [0] + [8] * 8
    if is_antithetic:
        assert torch.equal(steps[::2] + steps[1::2], torch.full((32,), 9.0, dtype=torch.float64))
