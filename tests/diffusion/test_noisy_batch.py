"""The fields of a noisy batch are listed once, and no tensor is forgotten."""

from dataclasses import fields

import pytest
import torch

from tests.tiny import LENGTH, packed_batch
from w1train.config.schema import DiffusionConfig
from w1train.diffusion.corruption import NoisyBatch, corrupt

CONFIGS = {
    "one stream": DiffusionConfig(timestep_per="document"),
    "joint": DiffusionConfig(block_size=4, timestep_per="block", clean_attention="token_causal", autoregressive_weight=0.5),
    "autoregressive": DiffusionConfig(objective="autoregressive"),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@each_config
def test_every_tensor_is_declared_and_has_the_shape_of_it(config):
    noisy = corrupt(packed_batch(range(3)), config, seed=1)
    tensors = {entry.name for entry in fields(noisy) if isinstance(getattr(noisy, entry.name), torch.Tensor)}
    by_extent = {extent: noisy.names(extent) for extent in ("token", "segment", "sample")}
    assert sorted(name for names in by_extent.values() for name in names) == sorted(tensors)
    assert all(getattr(noisy, name).shape == (3, LENGTH) for name in by_extent["token"])
    assert all(getattr(noisy, name).shape == (3,) for name in by_extent["sample"])
    segments = noisy.segment_index.max() + 1
    assert all(getattr(noisy, name).dim() == 1 and len(getattr(noisy, name)) >= segments for name in by_extent["segment"])


@each_config
def test_a_part_of_the_positions_has_every_field(config):
    noisy = corrupt(packed_batch(range(3)), config, seed=1)
    noisy.annealed = 0.25
    positions = torch.stack([torch.randperm(LENGTH, generator=torch.Generator().manual_seed(row))[:10] for row in range(3)])
    part = noisy.at(positions)
    for entry in fields(NoisyBatch):
        whole, own = getattr(noisy, entry.name), getattr(part, entry.name)
        if entry.name in noisy.names("token"):
            assert torch.equal(own, torch.stack([row[place] for row, place in zip(whole, positions, strict=True)])), entry.name
        else:
            assert own is whole, entry.name
