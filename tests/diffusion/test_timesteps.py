"""Timesteps: uniform, stratified over the global order, untied from positions and ranks, exact in integers."""

import pytest
import torch

from w1train.config.schema import DiffusionConfig
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
