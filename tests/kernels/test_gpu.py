"""The Triton kernels where they are meant to run, at W1-4B's width, against fp64; and twice, bit for bit."""

import pytest
import torch

from tests.kernels import oracle, row_terms
from w1train.kernels.rotary import apply_rotary
from w1train.model.chunked_head import linear_row_terms
from w1train.model.row_terms import CrossEntropy

pytestmark = pytest.mark.gpu
SHAPE = (300, 2)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _on_cuda():
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["one", "scattered", "uneven"])
@pytest.mark.parametrize("check", [oracle.check_norm, oracle.check_gate])
def test_modulation(check, name, dtype):
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(check(name, SHAPE, 2048, dtype, "triton", TOLERANCE[dtype]))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_segments", [False, True])
def test_plain_norm(with_segments, dtype):
    oracle.check_plain_norm(SHAPE, 2048, dtype, "triton", TOLERANCE[dtype], with_segments=with_segments)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", row_terms.TERMS)
def test_row_terms(name, dtype):
    oracle.check_term(name, 100, 64512, 33, 14, dtype, "triton", {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype])


def test_gradient_goes_into_the_fp32_buffer():
    """bf16 factors and an fp32 sum in one product, which the CPU has not."""
    rows = torch.randn((64, 128), dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn((512, 128), dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 512, (64,))
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones((512, 128)), False
    linear_row_terms(rows, weight, [CrossEntropy(targets)], oracle.one_rank(16))[0].sum().backward()
    wide = weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(rows.detach().double() @ wide.t(), targets, reduction="sum").backward()
    assert (weight.main_grad - 1 - wide.grad).norm() / wide.grad.norm() < 1e-2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_rotated", [64, 128])
def test_rotary(num_rotated, dtype):
    t = torch.randn((50, 2, 24, 128), dtype=torch.float64).to(dtype).requires_grad_()
    angles = (torch.rand((50, 2, 1, 64)) * 4096)[..., : num_rotated // 2].repeat(1, 1, 1, 2)

    def by_autograd(wide):
        turned, rest = wide.tensor_split([num_rotated], dim=-1)
        first, second = turned.chunk(2, dim=-1)
        turned = turned * angles.double().cos() + torch.cat([-second, first], dim=-1) * angles.double().sin()
        return torch.cat([turned, rest], dim=-1)

    oracle.compare(lambda x: apply_rotary(x, angles), by_autograd, [t], TOLERANCE[dtype])
