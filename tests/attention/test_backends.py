"""Every backend against an explicit softmax in fp64: outputs and gradients, on random packs, padding rows included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.cases import VARIANTS, inputs_of, long_pack, to_device, visibilities
from tests.slow import examples
from tests.tiny import packed_batch
from w1train.attention.attention_plan import plan_attention
from w1train.attention.backends import rectangles
from w1train.attention.backends.choice import BACKENDS
from w1train.attention.backends.reference import ReferenceBackend, attend_reference
from w1train.attention.backends.sdpa import DensePlan, SdpaBackend
from w1train.attention.visibility import document_visibility
from w1train.config.rules.attention_limits import AttentionCase

TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6}
NUM_HEADS = 4


def _case(kind, groups=NUM_HEADS, channels=8, precision="fp32"):
    return AttentionCase(kind, precision, NUM_HEADS, groups, channels)


def _check(backend, case, visibility, dtype, tolerance, scale=None, device="cpu"):
    """Each tensor by its own relative error; rows that see nothing are zero, and so are their gradients."""
    inputs = inputs_of(visibility, case, dtype, device)
    plan = backend.prepare(visibility)
    # Twice with one plan: layers share it.
    backend.attend(*inputs, plan, scale)
    output = backend.attend(*inputs, plan, scale)
    upstream = torch.randn_like(output)
    gradients = torch.autograd.grad(output, inputs, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    mask = visibility.dense()
    expected = attend_reference(*exact, mask, scale)
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())
    names = ("output", "query's gradient", "key's gradient", "value's gradient")
    for name, actual, wanted in zip(names, (output, *gradients), (expected, *expected_gradients), strict=True):
        assert torch.isfinite(actual).all(), name
        # Of gradients that cancel (one key: a softmax that cannot change) rounding is all there is.
        floor = 0.0 if dtype == torch.bfloat16 else 8 * torch.finfo(dtype).eps * upstream.double().norm()
        assert (actual.double() - wanted).norm() <= tolerance * wanted.norm() + floor, name
    blind = ~mask.any(dim=-1)
    assert (output.transpose(1, 2)[blind] == 0).all()
    assert (gradients[0].transpose(1, 2)[blind] == 0).all()


@given(visibilities(), st.sampled_from([4, 2, 1]), st.sampled_from(sorted(TOLERANCES, key=str)), st.sampled_from([None, 0.2]))
@settings(max_examples=examples(50))
def test_dense_kernels(kind_and_visibility, groups, dtype, scale):
    kind, visibility = kind_and_visibility
    assert isinstance(SdpaBackend().prepare(visibility), DensePlan)
    _check(SdpaBackend(), _case(kind, groups), visibility, dtype, TOLERANCES[dtype], scale)


@given(
    visibilities(kinds=tuple(name for name in VARIANTS if name != "scattered")),
    st.sampled_from([4, 2, 1]),
    st.sampled_from(sorted(TOLERANCES, key=str)),
    st.sampled_from([1, 300, 10_000, 10**6]),
)
@settings(max_examples=examples(60))
def test_rectangles(kind_and_visibility, groups, dtype, triples_per_call):
    """However fine they are cut."""
    kind, visibility = kind_and_visibility
    case = _case(kind, groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rectangles, "_LEAST_GAIN", 0.0)
        patch.setattr(rectangles, "_TRIPLES_PER_CALL", triples_per_call)
        assert visibility.everything_visible() or isinstance(SdpaBackend(case).prepare(visibility), list)
        _check(SdpaBackend(case), case, visibility, dtype, TOLERANCES[dtype])


@pytest.mark.parametrize("kind", [name for name in VARIANTS if name != "scattered"])
@pytest.mark.parametrize("by_rectangles", [True, False])
def test_bf16_on_the_cpu(kind, by_rectangles, monkeypatch):
    monkeypatch.setattr(rectangles, "_LEAST_GAIN", 0.0)
    case = _case(VARIANTS[kind][0], groups=2, channels=16, precision="bf16")
    _check(SdpaBackend(case if by_rectangles else None), case, long_pack(160, kind), torch.bfloat16, 1e-2)


@given(visibilities(), st.sampled_from([4, 1]))
@settings(max_examples=examples(30))
def test_reference_in_fp32(kind_and_visibility, groups):
    kind, visibility = kind_and_visibility
    _check(ReferenceBackend(), _case(kind, groups), visibility, torch.float32, TOLERANCES[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("name", BACKENDS)
def test_on_a_gpu(name, groups, kind):
    """Long packs, for tiles of 128 rows to be empty, full and partial; relative error of each tensor <= 1e-2 in bf16."""
    case = _case(VARIANTS[kind][0], groups, channels=64, precision="bf16")
    reason = BACKENDS[name].why_not(case, torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"{name} cannot serve {kind} here: {reason}")
    for padding in (0, 40):
        visibility = to_device(long_pack(700, kind, padding=padding), "cuda")
        _check(BACKENDS[name](case), case, visibility, torch.bfloat16, 1e-2, device="cuda")


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_matches_the_reference_on_packs_with_padding(groups, dtype, tolerance):
    """Without allowance for rounding, through the plan that a model is given."""
    documents = packed_batch(range(6)).document_ids
    documents[3] = -1  # a sample of padding alone
    visibility = document_visibility(documents)
    inputs = inputs_of(visibility, _case("documents", groups), dtype)
    output = plan_attention(visibility).attend(*inputs)
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
    visibility = document_visibility(torch.zeros((2, 16), dtype=torch.int32))
    plan = plan_attention(visibility)
    assert plan.kernel_plan.mask is None
    query, key, value = inputs_of(visibility, _case("documents"), torch.float32)
    everything = torch.ones((2, 16, 16), dtype=torch.bool)
    torch.testing.assert_close(plan.attend(query, key, value), attend_reference(query, key, value, everything))
