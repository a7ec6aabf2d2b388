"""Best-fit packing against its promises and a plain best-fit of one piece after the other."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from w1train.data.packed.best_fit import pack_best_fit

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any)


@given(lengths, st.sampled_from([(16, 1), (16, 4), (15, 5), (7, 1), (1, 1)]), st.integers(0, 2**63 - 1))
def test_every_document_whole_unless_too_long(document_lengths, shape, seed):
    sequence_length, align = shape
    packed = pack_best_fit(np.array(document_lengths), sequence_length, align, seed)
    # Each document's parts in order: full ones and a rest.
    for document, length in enumerate(document_lengths):
        of_document = packed.documents == document
        order = np.argsort(packed.ordinals[of_document])
        assert packed.ordinals[of_document][order].tolist() == list(range(-(-length // sequence_length)))
        full, rest = divmod(length, sequence_length)
        assert packed.lengths[of_document][order].tolist() == [sequence_length] * full + [rest] * (rest > 0)
    sizes = -(-packed.lengths // align) * align
    filled = np.bincount(packed.sample_of_piece, sizes, minlength=packed.num_samples)
    assert packed.sample_of_piece.tolist() == sorted(packed.sample_of_piece)
    assert len(filled) == packed.num_samples
    assert filled.min() > 0
    assert filled.max() <= sequence_length


@given(lengths, st.integers(1, 20))
def test_as_many_samples_as_one_piece_after_the_other(document_lengths, sequence_length):
    packed = pack_best_fit(np.array(document_lengths), sequence_length)
    rooms: list[int] = []
    for length in sorted(packed.lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting) if fitting else sequence_length
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    filled = np.bincount(packed.sample_of_piece, packed.lengths)
    assert sorted(sequence_length - filled) == sorted(rooms)


def test_waste_on_real_lengths():
    """Log-normal, as those of web text: well under 1 % of padding."""
    generator = np.random.default_rng(0)
    documents = np.maximum(2, np.round(600 * np.exp(1.1 * generator.standard_normal(100_000)))).astype(np.int64)
    assert pack_best_fit(documents, 4096).waste(4096) < 0.01
    assert pack_best_fit(documents, 4096, align=32).waste(4096) < 0.03, "the gaps before documents are counted"


def test_waste_on_the_sizes_of_real_files():
    """The sources of Python's standard library, at 3.6 bytes a token."""
    files = sorted(Path(os.__file__).parent.glob("**/*.py"))
    documents = np.array([1 + int(file.stat().st_size / 3.6) for file in files])
    assert len(documents) > 300
    assert pack_best_fit(documents, 4096).waste(4096) < 0.01
    assert pack_best_fit(documents, 4096, align=32).waste(4096) < 0.02


def test_the_seed_decides_and_nothing_else():
    documents = np.array([5, 5, 5, 3, 3, 3, 2] * 20)
    one, again, other = (pack_best_fit(documents, 16, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one.documents, other.documents)


@pytest.mark.parametrize("arguments", [([3], 10, 4), ([3], 0), ([0, 0], 4)])
def test_nothing_to_pack_or_bad_alignment(arguments):
    with pytest.raises(ValueError, match=r"align|no tokens"):
        pack_best_fit(np.array(arguments[0]), *arguments[1:])
