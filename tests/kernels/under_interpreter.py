"""The Triton kernels on the CPU, interpreted; run by test_triton.py in a process of its own, with TRITON_INTERPRET=1 from its start."""

import os

import pytest
import torch

from tests.kernels import oracle, row_terms
from tests.slow import slow_except
from w1train.kernels.rotary import apply_rotary
from w1train.kernels.segments import PIECE_SIZE
from w1train.kernels.selection import runs_triton

SHAPE = (7, 3)
# bf16: one rounding of the output, and of what comes in.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}
PRECISIONS = [torch.float32, torch.bfloat16]


def test_these_are_triton_kernels():
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert runs_triton(torch.zeros(1), "triton")


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", slow_except(["contiguous", "uneven"], oracle.SEGMENTS))
def test_modulated_norm(name, dtype):
    oracle.check_norm(name, SHAPE, 40, dtype, "triton", TOLERANCE[dtype])


def test_modulated_norm_of_several_pieces():
    """More rows of a segment than a program adds up; a size that is no power of two."""
    shape = (PIECE_SIZE + 9, 2)
    oracle.check_norm("uneven", shape, 24, torch.float32, "triton", 3e-6)
    oracle.check_gate("uneven", shape, 24, torch.float32, "triton", 3e-6)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", [SHAPE, (PIECE_SIZE + 1,)], ids=str)
@pytest.mark.parametrize("with_segments", [False, True])
def test_plain_norm(shape, with_segments, dtype):
    oracle.check_plain_norm(shape, 40, dtype, "triton", TOLERANCE[dtype], with_segments=with_segments)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", slow_except(["contiguous", "uneven"], oracle.SEGMENTS))
def test_gate(name, dtype):
    oracle.check_gate(name, SHAPE, 40, dtype, "triton", TOLERANCE[dtype])


@pytest.mark.parametrize("check", [oracle.check_norm, oracle.check_gate])
def test_equals_the_twin_and_itself(check):
    """fp32: the twin's numbers to rounding, its own to the last bit."""
    results = []
    for implementation in ("triton", "triton", "torch"):
        torch.manual_seed(3)
        results.append(check("scattered", SHAPE, 40, torch.float32, implementation, 3e-6))
    for first, second, twin in zip(*results, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, twin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", slow_except([torch.float32], PRECISIONS))
@pytest.mark.parametrize(("vocabulary", "chunk_size", "excluded"), [(50, 4, None), (50, 9, 14), (4100, 3, 4099)])
@pytest.mark.parametrize("name", row_terms.IN_TRITON)
def test_row_terms(name, vocabulary, chunk_size, excluded, dtype):
    """The last vocabulary is more than one block of the kernels."""
    oracle.check_term(name, 9, vocabulary, chunk_size, excluded, dtype, "triton", {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype])


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("channels", [12, 14, 19])
def test_rotary(channels, dtype):
    """The input is a view, as queries are of the projection; every token has its own angle. Channels after the twelfth stay as they are."""
    projection = torch.randn((5, 2, 3, 20), dtype=torch.float64).to(dtype).requires_grad_()
    angles = torch.randn((5, 2, 1, 6)).repeat(1, 1, 1, 2) * 10

    def by_autograd(t):
        first, second = t[..., :12].chunk(2, dim=-1)
        wide = angles.double()
        turned = t[..., :12] * wide.cos() + torch.cat([-second, first], dim=-1) * wide.sin()
        return torch.cat([turned, t[..., 12:channels]], dim=-1)

    oracle.compare(lambda t: apply_rotary(t[..., :channels], angles), by_autograd, [projection], TOLERANCE[dtype])
