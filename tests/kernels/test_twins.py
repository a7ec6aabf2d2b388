"""The plain PyTorch twins against fp64 autograd, what they keep, and the pieces that the Triton kernels work on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import oracle
from w1train.config.errors import UserError
from w1train.kernels.modulation import gate_residual, rms_norm
from w1train.kernels.segments import Segments, cut_pieces
from w1train.kernels.selection import runs_triton

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", oracle.SEGMENTS)
def test_modulation(name, dtype):
    oracle.check_norm(name, (7, 3), 40, dtype, "torch", TOLERANCE[dtype])
    oracle.check_gate(name, (7, 3), 40, dtype, "torch", TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_segments", [False, True])
def test_plain_norm(with_segments, dtype):
    oracle.check_plain_norm((7, 3), 40, dtype, "torch", TOLERANCE[dtype], with_segments=with_segments)


def _saved(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        function()
    return saved


def test_keep_no_tensor_per_token_but_their_input():
    """A gathered row per token is what segments are there to avoid, a normalised copy what 1 / rms is kept for."""
    x, residual = torch.randn((7, 3, 5), requires_grad=True), torch.randn((7, 3, 5))
    shift, scale = torch.randn((4, 5), requires_grad=True), torch.randn((4, 5), requires_grad=True)
    segments = Segments(torch.randint(0, 4, (7, 3)))
    for function in (
        lambda: rms_norm(x, torch.ones(5), 1e-6, shift, scale, segments),
        lambda: gate_residual(residual, shift, x, segments),
    ):
        assert [tensor.data_ptr() for tensor in _saved(function) if tensor.numel() == x.numel()] == [x.data_ptr()]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 9))
def test_pieces_have_every_row_once_in_order(segments, size):
    index = torch.tensor(segments)
    pieces = cut_pieces(index, 7, size)
    seen = []
    for piece, (start, end, segment) in enumerate(zip(pieces.start, pieces.end, pieces.segment, strict=True)):
        rows = pieces.order[start:end]
        assert len(rows) <= size
        assert (index[rows.long()] == segment).all()
        assert len(rows) == 0 or pieces.first[segment] <= piece < pieces.first[segment + 1]
        seen += rows.tolist()
    assert seen == sorted(range(len(segments)), key=lambda row: segments[row])
    assert all((pieces.end > pieces.start)[: pieces.first[-1]])


def test_triton_is_refused_where_it_cannot_run():
    assert not runs_triton(torch.zeros(1), "auto")
    with pytest.raises(UserError, match=r"kernels.elementwise is triton, but Triton's kernels need CUDA tensors and these are on cpu"):
        runs_triton(torch.zeros(1), "triton")
