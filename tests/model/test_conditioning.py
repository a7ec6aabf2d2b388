"""Segment modulation against plain autograd, and the sinusoid."""

import pytest
import torch

from w1train.runtime.cpu import import_megatron

import_megatron()

from w1train.model.conditioning import gate_residual, modulate, timestep_sinusoid  # noqa: E402


def _tensors(num_segments):
    return [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((7, 3, 5), (num_segments, 5), (num_segments, 5), (7, 3, 5))
    ]


@pytest.mark.parametrize("by_sample", [True, False])
def test_forward_and_gradients_equal_plain_autograd(by_sample):
    x, first, second, residual = _tensors(3 if by_sample else 4)
    index = None if by_sample else torch.randint(0, 4, (7, 3))
    rows = torch.arange(3).expand(7, 3) if by_sample else index
    plain = x * (1 + second[rows]) + first[rows]
    torch.testing.assert_close(modulate(x, first, second, index), plain)
    upstream = torch.randn_like(x)
    for ours, expected in (
        (modulate(x, first, second, index), plain),
        (gate_residual(residual, first, x, index), residual + first[rows] * x),
    ):
        inputs = (x, first, second, residual)
        actual = torch.autograd.grad(ours, inputs, upstream, allow_unused=True)
        wanted = torch.autograd.grad(expected, inputs, upstream, allow_unused=True)
        for a, b in zip(actual, wanted, strict=True):
            assert (a is None) == (b is None)
            # Segment sums are kept in fp32, whatever the inputs are.
            assert a is None or torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_saves_no_tensor_of_modulation_per_token():
    """Only x and the tables may be kept for backward: a gathered [s, b, h] row per token is what segments are there to avoid."""
    saved = []
    x, shift, scale, _ = (tensor.float() for tensor in _tensors(4))
    index = torch.randint(0, 4, (7, 3))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        modulate(x, shift, scale, index)
    of_token_size = [tensor for tensor in saved if tensor.shape == x.shape]
    assert [tensor.data_ptr() for tensor in of_token_size] == [x.data_ptr()]


def test_sinusoid_tells_near_timesteps_apart():
    embedded = timestep_sinusoid(torch.tensor([0.5, 0.502]) * 1000, 256)
    assert embedded.shape == (2, 256)
    assert embedded.dtype == torch.float32
    assert (embedded[0] - embedded[1]).abs().max() > 0.5
    torch.testing.assert_close(embedded[0, 0], torch.tensor(500.0).cos())
