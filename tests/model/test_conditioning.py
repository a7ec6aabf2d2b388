"""The sinusoid of the timestep. What modulates with it is in tests/kernels."""

import torch

from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.model.conditioning import timestep_sinusoid  # noqa: E402


def test_sinusoid_tells_near_timesteps_apart():
    embedded = timestep_sinusoid(torch.tensor([0.5, 0.502]) * 1000, 256)
    assert embedded.shape == (2, 256)
    assert embedded.dtype == torch.float32
    assert (embedded[0] - embedded[1]).abs().max() > 0.5
    torch.testing.assert_close(embedded[0, 0], torch.tensor(500.0).cos())
