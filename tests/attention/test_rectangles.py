"""Rectangles cover every visible pair once, and are taken where they pay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.cases import VARIANTS, long_pack, visibilities
from tests.slow import examples
from w1train.attention.backends import rectangles
from w1train.attention.backends.rectangles import rectangles_of
from w1train.attention.backends.reference import attend_reference
from w1train.attention.cache import cached_visibility
from w1train.attention.visibility import Visibility, block_diffusion_visibility, document_visibility

INTERVAL_KINDS = tuple(name for name in VARIANTS if name != "scattered")


def _covered(visibility, found):
    """How often each pair is computed, int64 [b, q, k], from slices and masks alone."""
    _, num_samples, num_rows = visibility.endpoints.shape
    counts = torch.zeros((num_samples, num_rows, visibility.num_keys), dtype=torch.int64)
    for rectangle in found:
        start = 0
        for first, last in rectangle.keys:
            seen = 1 if rectangle.mask is None else rectangle.mask[:, start : start + last - first].long()
            counts[rectangle.samples, rectangle.rows, first:last] += seen
            start += last - first
    return counts


@given(visibilities(kinds=INTERVAL_KINDS), st.sampled_from([1, 30, 1000, 10**7]))
@settings(max_examples=examples(100))
def test_every_visible_pair_once_and_no_other(kind_and_visibility, triples_per_call):
    _, visibility = kind_and_visibility
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rectangles, "_LEAST_GAIN", 0.0)
        patch.setattr(rectangles, "_TRIPLES_PER_CALL", triples_per_call)
        assert torch.equal(_covered(visibility, rectangles_of(visibility, width=8)), visibility.dense().long())


def test_documents_are_their_own_rectangles():
    documents = torch.repeat_interleave(torch.arange(4, dtype=torch.int32), torch.tensor([300, 200, 400, 124]))[None]
    found = rectangles_of(document_visibility(documents), width=3072)
    assert [(rectangle.rows, rectangle.keys, rectangle.mask) for rectangle in found] == [
        (slice(first, last), ((first, last),), None) for first, last in ((0, 300), (300, 500), (500, 900), (900, 1024))
    ]


def test_noisy_rows_read_their_block_and_the_clean_tokens_before_it():
    found = rectangles_of(block_diffusion_visibility(torch.zeros((1, 2048), dtype=torch.int32), 1024, "document"), width=3072)
    assert [(rectangle.rows, rectangle.keys) for rectangle in found] == [
        (slice(0, 1024), ((0, 1024),)),
        (slice(1024, 2048), ((1024, 3072),)),
        (slice(2048, 3072), ((2048, 3072),)),
        (slice(3072, 4096), ((2048, 4096),)),
    ]


@pytest.mark.parametrize("kind", [kind for kind in INTERVAL_KINDS if kind != "any intervals"])
def test_computes_not_many_pairs_more_than_are_visible(kind):
    visibility = long_pack(2048, kind)
    found = rectangles_of(visibility, width=3072)
    computed = sum((part.rows.stop - part.rows.start) * sum(last - first for first, last in part.keys) for part in found)
    assert computed <= 1.6 * int(visibility.num_visible_pairs())
    assert len(found) < 200


def test_not_where_calls_cost_more_than_they_save():
    small = document_visibility(torch.tensor([[0] * 20 + [1] * 12], dtype=torch.int32))
    assert rectangles_of(small, width=64) is None
    # Two documents of a thousand tokens are worth two calls, but not when one of them has all the rows.
    sizes = torch.tensor([2040, 8])
    uneven = document_visibility(torch.repeat_interleave(torch.arange(2, dtype=torch.int32), sizes)[None])
    assert rectangles_of(uneven, width=3072) is None


@given(visibilities(kinds=INTERVAL_KINDS), st.sampled_from([10, 100, 1000, 10**4, 10**5]))
@settings(max_examples=examples(200))
def test_where_nothing_is_sought_nothing_would_be_found(kind_and_visibility, triples_per_call):
    _, visibility = kind_and_visibility
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rectangles, "_TRIPLES_PER_CALL", triples_per_call)
        is_found = rectangles_of(visibility, width=8) is not None
        patch.setattr(rectangles, "_least_cost", lambda *_: 0.0)
        assert (rectangles_of(visibility, width=8) is not None) == is_found


def test_nothing_is_sought_in_samples_too_short_for_a_call_each(monkeypatch):
    monkeypatch.setattr(rectangles, "_runs", None)
    documents = torch.tensor([[0] * 20 + [1] * 12] * 4, dtype=torch.int32)
    assert rectangles_of(document_visibility(documents), width=64) is None
    assert rectangles_of(block_diffusion_visibility(documents, 4, "document"), width=48) is None


def test_scattered_pairs_are_no_rectangles():
    assert rectangles_of(long_pack(700, "scattered"), width=10**9) is None


def test_one_sample_stands_for_all(monkeypatch):
    """The visibility of generation: endpoints of one sample, queries of several."""
    monkeypatch.setattr(rectangles, "_LEAST_GAIN", 0.0)
    visibility = cached_visibility(64, 8, 4, "block", num_rows=10, device="cpu")
    found = rectangles_of(visibility, width=10**9)
    assert all(rectangle.samples == slice(None) for rectangle in found)
    query, key, value = torch.randn((3, 2, 10, 8)), torch.randn((3, 2, 74, 8)), torch.randn((3, 2, 74, 8))
    output = rectangles.attend_rectangles(query, key, value, found)
    torch.testing.assert_close(output, attend_reference(query, key, value, visibility.dense()))
    assert (output[:, :, 8:] == 0).all()


def test_nothing_visible_at_all():
    nothing = Visibility(torch.zeros((3, 1, 5), dtype=torch.int32), 5)
    query = torch.randn((1, 2, 5, 8), requires_grad=True)
    output = rectangles.attend_rectangles(query, query, query, [])
    output.sum().backward()
    assert (output == 0).all()
    assert (query.grad == 0).all()
    assert rectangles_of(nothing, width=10**9) == []
