"""The plain PyTorch twins against fp64 autograd, what they keep, and the pieces that the Triton kernels work on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import oracle
from w1train.config.errors import UserError
from w1train.kernels.cross_entropy import Head, linear_cross_entropy
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
def test_plain_norm(dtype):
    oracle.check_plain_norm((7, 3), 40, dtype, "torch", TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("excluded", [None, 14])
@pytest.mark.parametrize("chunk_size", [1, 4, 9, 100])
def test_cross_entropy(chunk_size, excluded, dtype):
    oracle.check_cross_entropy(9, 50, chunk_size, excluded, dtype, "torch", {torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype])


def test_cross_entropy_of_nothing():
    """A micro-batch in which no token is masked."""
    weight = torch.randn((5, 4), requires_grad=True)
    rows = torch.zeros((0, 4), requires_grad=True)
    found = linear_cross_entropy(rows, weight, torch.zeros(0, dtype=torch.long), Head(4, None, 0, None, sum_row_gradients=True))
    found.sum().backward()
    assert found.shape == (0,)
    assert weight.grad.count_nonzero() == 0


def test_gradient_goes_into_the_fp32_buffer():
    """On top of what is there, chunk by chunk, without a rounding to bf16; autograd gets zeros to add to a tied embedding's gradient."""
    rows = torch.randn((40, 12), dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn((50, 12), dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 50, (40,))
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = torch.ones((50, 12)), False, True
    linear_cross_entropy(rows, weight, targets, Head(8, None, 0, None, sum_row_gradients=True)).sum().backward()
    wide = weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(rows.detach().double() @ wide.t(), targets, reduction="sum").backward()
    error = (weight.main_grad - 1 - wide.grad).norm() / wide.grad.norm()
    assert error < 1e-2
    assert weight.grad_added_to_main_grad
    assert weight.grad.count_nonzero() == 0


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


def _largest_tensor(function):
    """Elements of the largest tensor that any operation inside makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            output = operation(*args, **(kwargs or {}))
            sizes.extend(value.untyped_storage().nbytes() for value in torch.utils._pytree.tree_leaves(output) if torch.is_tensor(value))
            return output

    with Watch():
        function()
    return max(sizes)


def test_never_holds_all_logits():
    """In both directions the largest tensor has a chunk's logits (fp32 in the twin), and in between two numbers a row
    are kept."""
    num_rows, vocabulary, size, chunk_size = 256, 512, 8, 32
    rows = torch.randn((num_rows, size), dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn((vocabulary, size), dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, vocabulary, (num_rows,))

    def run(chunk_size):
        head = Head(chunk_size, None, 0, None, sum_row_gradients=True)
        return lambda: linear_cross_entropy(rows, weight, targets, head).sum().backward()

    assert _largest_tensor(run(num_rows)) == num_rows * vocabulary * 4
    assert _largest_tensor(run(chunk_size)) == chunk_size * vocabulary * 4
    assert sum(tensor.nbytes for tensor in _saved(run(chunk_size))) == rows.nbytes + weight.nbytes + targets.nbytes + 2 * num_rows * 4


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
