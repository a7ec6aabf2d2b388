"""transformer-engine's plans: documents end to end, and the additive mask."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.attention.cases import VARIANTS, long_pack, visibilities
from w1train.attention.backends.reference import attend_reference
from w1train.attention.backends.te import BiasPlan, PackedPlan, TransformerEngineBackend, bias_plan, packed_plan
from w1train.config.rules.attention_limits import AttentionCase


@given(visibilities(kinds=("documents", "causal")))
def test_packed_documents_are_the_mask(kind_and_visibility):
    """What the library promises for its boundaries, written out as a mask, is ours but for padding, which is zeroed."""
    kind, visibility = kind_and_visibility
    plan = packed_plan(visibility)
    boundaries = plan.boundaries.tolist()
    size = visibility.endpoints[0].numel()
    assert boundaries[0] == 0
    assert boundaries[-1] == size
    promised = torch.zeros((size, size), dtype=torch.bool)
    for first, last in pairwise(boundaries):
        promised[first:last, first:last] = True
        assert last - first <= plan.longest
    promised = promised.tril() if kind == "causal" else promised
    blocks = [promised[start : start + visibility.num_keys] for start in range(0, size, visibility.num_keys)]
    own = torch.stack([rows[:, index * visibility.num_keys :][:, : visibility.num_keys] for index, rows in enumerate(blocks)])
    mask = visibility.dense()
    assert torch.equal(own & ~plan.blind_rows[..., None], mask)
    # No row of one sample sees another sample, and no token sees padding: the sums agree.
    assert int(promised.sum()) == int(own.sum())


@given(visibilities(), st.integers(1, 2))
def test_bias_is_the_mask(kind_and_visibility, num_heads):
    _, visibility = kind_and_visibility
    plan = bias_plan(visibility)
    assert torch.equal((plan.bias[:, 0] == 0) & ~plan.blind_rows[..., None], visibility.dense())
    assert plan.bias.isfinite().all()
    _, num_samples, num_rows = visibility.endpoints.shape
    query = torch.randn((num_samples, num_heads, num_rows, 8))
    key, value = (torch.randn((num_samples, num_heads, visibility.num_keys, 8)) for _ in range(2))
    weights = (query @ key.transpose(-1, -2) * 8**-0.5 + plan.bias.float()).softmax(dim=-1)
    output = (weights @ value).masked_fill(plan.blind_rows[:, None, :, None], 0.0)
    torch.testing.assert_close(output, attend_reference(query, key, value, visibility.dense()))


class _Library:
    """In the place of DotProductAttention: the same, from what its documentation says of the arguments."""

    def __init__(self, num_groups):
        self.num_groups = num_groups

    def __call__(self, query, key, value, *, qkv_format, attn_mask_type, **arguments):
        if qkv_format == "bshd":
            assert attn_mask_type == "no_mask"
            mask = arguments["core_attention_bias"][:, 0] == 0
            output = attend_reference(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
            return output.transpose(1, 2).flatten(2)
        assert qkv_format == "thd"
        bounds = arguments["cu_seqlens_q"].tolist()
        parts = []
        for first, last in pairwise(bounds):
            part = (tensor[first:last].transpose(0, 1)[None] for tensor in (query, key, value))
            mask = torch.ones((1, last - first, last - first), dtype=torch.bool)
            mask = mask.tril() if attn_mask_type == "padding_causal" else mask
            parts.append(attend_reference(*part, mask)[0].transpose(0, 1))
        return torch.cat(parts).flatten(1)


@pytest.mark.parametrize("kind", VARIANTS)
def test_layouts_in_and_out(kind, monkeypatch):
    """The library gets [t, n, d] or [b, q, n, d] and gives the heads flattened; rows come back where they were."""
    case = AttentionCase(VARIANTS[kind][0], "bf16", 4, 2, 8)
    backend = TransformerEngineBackend(case)
    monkeypatch.setattr(backend, "_module", lambda _scale: _Library(2))
    visibility = long_pack(70, kind, padding=10)
    plan = backend.prepare(visibility)
    assert isinstance(plan, PackedPlan if case.kind in ("documents", "causal") else BiasPlan)
    rows, keys = visibility.endpoints.shape[2], visibility.num_keys
    query, key, value = torch.randn((2, 4, rows, 8)), torch.randn((2, 2, keys, 8)), torch.randn((2, 2, keys, 8))
    output = backend.attend(query, key, value, plan)
    torch.testing.assert_close(output, attend_reference(query, key, value, visibility.dense()))
