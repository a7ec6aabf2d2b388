"""Visibility: endpoints, dense mask and count agree with the definition, on random packs."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from w1train.attention.visibility import Visibility, causal_visibility, document_visibility, scattered_visibility
from w1train.data.documents import document_bounds
from w1train.diffusion.philox import Purpose, random_words


@st.composite
def packs(draw):
    """document ids [b, l]: contiguous runs, padding at the end and, as data.align leaves it, at the ends of some documents or all over
    them."""
    length = draw(st.integers(1, 40))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, length), max_size=5)))
        padding = draw(st.integers(0, length))
        row = [sum(position >= cut for cut in cuts) if position < length - padding else -1 for position in range(length)]
        for cut in cuts:
            gap = draw(st.integers(0, 3))
            row[max(cut - gap, 0) : cut] = [-1] * min(gap, cut)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int32)


@given(packs())
def test_sees_its_document_and_nothing_else(documents):
    visibility = document_visibility(documents)
    expected = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, :, None]
    assert torch.equal(visibility.dense(), expected)
    assert int(visibility.num_visible_pairs()) == int(expected.sum())
    assert visibility.everything_visible() == bool(expected.all())
    assert (visibility.endpoints.diff(dim=0) >= 0).all()
    assert visibility.endpoints.dtype == torch.int32


@given(packs())
def test_bounds_are_those_of_the_run(documents):
    start, end = document_bounds(documents)
    for row, ids in enumerate(documents.tolist()):
        for position, document in enumerate(ids):
            first = next(p for p in range(position, -1, -1) if p == 0 or ids[p - 1] != document)
            last = next(p for p in range(position, len(ids)) if p + 1 == len(ids) or ids[p + 1] != document)
            assert (int(start[row, position]), int(end[row, position])) == (first, last + 1)


def test_three_intervals():
    endpoints = torch.tensor([2, 4, 5, 7, 9], dtype=torch.int32)[:, None, None]
    visibility = Visibility(endpoints, num_keys=10)
    assert visibility.dense()[0, 0].int().tolist() == [1, 1, 0, 0, 1, 0, 0, 1, 1, 0]
    assert int(visibility.num_visible_pairs()) == 5


@given(packs(), st.integers(0, 45))
def test_causal_sees_what_is_before_and_as_far_behind_as_its_extent(documents, extent):
    visibility = causal_visibility(documents, extent)
    position = torch.arange(documents.shape[1])
    same = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, :, None]
    expected = same & (position[None, :] <= position[:, None] + extent)
    assert torch.equal(visibility.dense(), expected)
    assert int(visibility.num_visible_pairs()) == int(expected.sum())
    assert (visibility.endpoints.diff(dim=0) >= 0).all()


def test_scattered_pairs_go_from_causal_to_all():
    """Of eight tokens 36 pairs are visible at ratio 0, and 64 at ratio 1."""
    documents, samples = torch.zeros((1, 8), dtype=torch.int32), torch.tensor([5])
    assert [int(scattered_visibility(documents, ratio, 0, samples).num_visible_pairs()) for ratio in (0.0, 1.0)] == [36, 64]
    wide = torch.zeros((2, 64), dtype=torch.int32)
    half = scattered_visibility(wide, 0.5, 0, torch.tensor([5, 6])).dense()
    assert half.tril().sum() == 2 * 64 * 65 / 2
    assert abs(float(half.triu(1).sum()) / (64 * 63) - 0.5) < 0.03
    assert not torch.equal(half[0], half[1]), "each sample draws its own"
    assert torch.equal(half[1], scattered_visibility(wide[:1], 0.5, 0, torch.tensor([6])).dense()[0]), "and draws it in any batch"


def test_scattered_pairs_have_numbers_of_their_own():
    """One word for each pair, which depends on the seed, the sample and both positions, and which noise does not draw."""
    length, ratio, seed, samples = 12, 0.4, 9, [5, 2**33 + 1]
    mask = scattered_visibility(torch.zeros((2, length), dtype=torch.int32), ratio, seed, torch.tensor(samples)).dense()
    for row, sample in enumerate(samples):
        for query in range(length):
            key = torch.tensor([sample * length + query])
            words = random_words(seed, key, draw=0, purpose=Purpose.ATTENTION, num=length)[0].tolist()
            assert mask[row, query].tolist() == [place <= query or word < int(ratio * 2**32) for place, word in enumerate(words)]


@given(packs(), st.floats(0, 1))
def test_scattered_pairs_stay_in_their_document(documents, ratio):
    visibility = scattered_visibility(documents, ratio, 3, torch.arange(len(documents)))
    same = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, :, None]
    mask = visibility.dense()
    assert not (mask & ~same).any()
    assert torch.equal(visibility.pairs_per_row(), mask.sum(dim=-1))
