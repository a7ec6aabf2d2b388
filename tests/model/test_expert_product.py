"""The products with the experts' matrices, and the choice between them."""

import logging

import pytest
import torch

from tests.tiny import tiny_config
from w1train.config.errors import UserError
from w1train.config.schema import KernelsConfig
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.model.experts.grouped_mlp import grouped_linear, loop_linear  # noqa: E402
from w1train.model.fusions import choose_expert_product  # noqa: E402
from w1train.runtime import kernel_choices  # noqa: E402


def _product_and_gradients(function, num_rows, dtype, *, gradient_of_sum):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((sum(num_rows), 16), generator=generator).to(dtype).requires_grad_()
    weights = torch.randn((len(num_rows), 24, 16), generator=generator).to(dtype).requires_grad_()
    output = function(rows, weights, torch.tensor(num_rows))
    factor = 1 if gradient_of_sum else torch.randn(output.shape, generator=generator).to(dtype)
    output.sum().backward() if gradient_of_sum else (output * factor).sum().backward()
    return output, rows.grad, weights.grad


@pytest.mark.parametrize("gradient_of_sum", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [[5, 3, 8], [0, 7, 0, 2], [0, 0, 4]], ids=str)
def test_grouped_product_equals_the_loop(num_rows, dtype, gradient_of_sum):
    """Bit for bit, with experts that have no row and a gradient that is one number expanded."""
    grouped, looped = (_product_and_gradients(f, num_rows, dtype, gradient_of_sum=gradient_of_sum) for f in (grouped_linear, loop_linear))
    for found, expected in zip(grouped, looped, strict=True):
        assert torch.equal(found, expected)


def test_experts_without_any_row_have_zero_gradients():
    output, rows, weights = _product_and_gradients(loop_linear, [0, 0], torch.float32, gradient_of_sum=True)
    assert (output.shape, rows.shape) == ((0, 24), (0, 16))
    assert torch.equal(weights, torch.zeros(2, 24, 16))


def _choice(experts="auto", *, hidden_size=64, width=32, num_tensor_ranks=1, precision="bf16", on_cuda=False):
    model = tiny_config(model={"hidden_size": hidden_size}).model
    model.experts.ffn_hidden_size = width
    return choose_expert_product(KernelsConfig(experts=experts), model, num_tensor_ranks, precision, on_cuda=on_cuda)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"hidden_size": 36}, "model.hidden_size gives rows of 36 numbers of 2 bytes"),
        ({"num_tensor_ranks": 8}, "model.experts.ffn_hidden_size over 8 ranks gives rows of 4 numbers of 2 bytes"),
        ({"hidden_size": 34, "precision": "fp32"}, "model.hidden_size gives rows of 34 numbers of 4 bytes"),
        ({"precision": "fp32", "on_cuda": True}, "a kernel for bf16 alone"),
        ({"on_cuda": True}, r"this GPU has \(8, 0\)"),
    ],
)
def test_the_loop_is_taken_where_the_grouped_product_cannot_run(case, words, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    kernel_choices._choices.clear()
    with caplog.at_level(logging.INFO):
        assert _choice(**case) == "loop"
    with pytest.raises(UserError, match=f"kernels.experts is grouped_mm, but .*{words}.*set kernels.experts=auto or loop") as refusal:
        _choice("grouped_mm", **case)
    assert caplog.messages == [f"kernels.experts: loop ({str(refusal.value).split('but ')[1].split('; set')[0]})"]


@pytest.mark.parametrize("case", [{}, {"precision": "fp32"}, {"hidden_size": 36, "precision": "fp32"}, {"on_cuda": True}])
def test_the_grouped_product_is_taken_where_it_can_run(case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert _choice(**case) == "grouped_mm"
    assert _choice("loop", **case) == "loop"


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [[128, 5, 0, 67], [0, 0, 1]], ids=str)
def test_grouped_product_equals_the_loop_on_cuda(num_rows):
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch has no grouped kernel for this GPU")
    with torch.device("cuda"):
        rows, weights = torch.randn((sum(num_rows), 64)), torch.randn((len(num_rows), 128, 64))
    results = []
    for function in (grouped_linear, loop_linear):
        inputs = [value.bfloat16().requires_grad_() for value in (rows, weights)]
        output = function(*inputs, torch.tensor(num_rows))
        results.append([output, *torch.autograd.grad(output.sum(), inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
