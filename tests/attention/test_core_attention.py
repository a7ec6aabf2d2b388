"""The dense kernels against an explicit softmax, forward and backward, padding rows included."""

import pytest
import torch

from tests.tiny import packed_batch
from w1train.attention.core_attention import attend, attend_reference
from w1train.attention.plan import plan_attention
from w1train.attention.visibility import document_visibility


def _inputs(num_samples, length, heads, groups, channels, dtype):
    shapes = [(num_samples, heads, length, channels), (num_samples, groups, length, channels), (num_samples, groups, length, channels)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_matches_the_reference_on_packs_with_padding(groups, dtype, tolerance):
    documents = packed_batch(range(6)).document_ids
    documents[3] = -1  # a sample of padding alone
    visibility = document_visibility(documents)
    inputs = _inputs(6, documents.shape[1], 4, groups, 8, dtype)
    output = attend(*inputs, plan_attention(visibility))
    upstream = torch.randn_like(output)
    gradients = torch.autograd.grad(output, inputs, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = attend_reference(*exact, visibility.dense())
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())
    for actual, wanted in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert torch.isfinite(actual).all()
        assert (actual.double() - wanted).norm() <= tolerance * wanted.norm()
    assert (output[3] == 0).all()
    assert all((gradient[3] == 0).all() for gradient in gradients)


def test_no_mask_where_everything_is_visible():
    plan = plan_attention(document_visibility(torch.zeros((2, 16), dtype=torch.int32)))
    assert plan.mask is None
    query, key, value = _inputs(2, 16, 4, 4, 8, torch.float32)
    everything = torch.ones((2, 16, 16), dtype=torch.bool)
    torch.testing.assert_close(attend(query, key, value, plan), attend_reference(query, key, value, everything))
