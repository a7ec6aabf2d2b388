"""Packing against a naive concatenation: every token once an epoch, in order, with its document and position."""

from __future__ import annotations

import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.indexed import write_index
from w1train.data.packing import PackedDataset, permutation

document_lengths = st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(any)


def numbered_dataset(directory, lengths) -> TokenDataset:
    """Documents of the lengths given (0 as well), whose tokens are all different: 0, 1, 2, ..."""
    prefix = Path(directory, "x")
    with open(f"{prefix}.idx", "wb") as file:
        write_index(file, np.dtype("int32"), np.array(lengths, dtype=np.int32))
    np.arange(sum(lengths), dtype=np.int32).tofile(f"{prefix}.bin")
    return TokenDataset.open(prefix)


def epoch_samples(packed, epoch=0):
    num_samples = packed.num_samples_per_epoch
    return [packed.sample(index) for index in range(epoch * num_samples, (epoch + 1) * num_samples)]


def real(sample):
    """tokens, document_ids and positions without padding."""
    mask = sample[1] >= 0
    return tuple(array[mask] for array in sample)


@given(document_lengths, st.integers(1, 15), st.integers(0, 2**64 - 1), st.integers(0, 3))
def test_an_epoch_is_each_document_once_in_a_shuffled_order(lengths, sequence_length, seed, epoch):
    with tempfile.TemporaryDirectory() as directory:
        dataset = numbered_dataset(directory, lengths)
        packed = PackedDataset(dataset, sequence_length, seed, drop_last=False)
        concatenation = np.concatenate([real(sample)[0] for sample in epoch_samples(packed, epoch)])
        documents = {int(dataset.document_offsets[i]): dataset.document_tokens(i).tolist() for i in range(len(lengths)) if lengths[i]}
    # Cut the concatenation where documents begin: the pieces must be exactly the documents, whole and in one stretch each.
    starts = [i for i, token in enumerate(concatenation) if token in documents]
    pieces = [concatenation[i:j].tolist() for i, j in itertools.pairwise([*starts, len(concatenation)])]
    assert sorted(pieces) == sorted(documents.values())


@given(document_lengths, st.integers(1, 15), st.booleans())
def test_samples_are_cut_from_the_concatenation(lengths, sequence_length, drop_last):
    """Without shuffling, against the definition."""
    with tempfile.TemporaryDirectory() as directory:
        dataset = numbered_dataset(directory, lengths)
        if drop_last and sum(lengths) < sequence_length:
            with pytest.raises(DatasetError, match="fewer than one sample"):
                PackedDataset(dataset, sequence_length, seed=0)
            return
        samples = epoch_samples(PackedDataset(dataset, sequence_length, seed=0, shuffle=False, drop_last=drop_last))
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    num_samples = sum(lengths) // sequence_length if drop_last else -(-sum(lengths) // sequence_length)
    assert len(samples) == num_samples
    for i, sample in enumerate(samples):
        tokens, document_ids, positions = real(sample)
        expected = np.arange(i * sequence_length, min((i + 1) * sequence_length, sum(lengths)))
        assert tokens.tolist() == expected.tolist()
        owners = document_of[expected]
        assert document_ids.tolist() == [sorted(set(owners)).index(owner) for owner in owners]
        assert positions.tolist() == [int(np.sum(owners[:k] == owner)) for k, owner in enumerate(owners)]
        padding = sample[1] < 0
        assert padding.tolist() == sorted(padding.tolist()), "padding is a suffix"
        assert not sample[0][padding].any()
        assert not sample[2][padding].any()
        assert [array.dtype.name for array in sample] == ["int64", "int32", "int32"]
        assert all(len(array) == sequence_length for array in sample)


@given(document_lengths, st.integers(1, 15), st.integers(0, 2))
def test_shuffled_samples_are_the_same_samples(lengths, sequence_length, epoch):
    with tempfile.TemporaryDirectory() as directory:
        dataset = numbered_dataset(directory, lengths)
        plain, mixed = (PackedDataset(dataset, sequence_length, 7, shuffle_samples=mix, drop_last=False) for mix in (False, True))
        as_lists = [sorted([array.tolist() for array in sample] for sample in epoch_samples(packed, epoch)) for packed in (plain, mixed)]
    assert as_lists[0] == as_lists[1]


@settings(max_examples=20)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=30))
def test_a_sample_depends_on_its_index_alone(indices):
    """Whatever was read before, in whatever order, from whatever thread: this is what makes resuming exact."""
    with tempfile.TemporaryDirectory() as directory:
        dataset = numbered_dataset(directory, [3, 8, 1, 5, 9])
        fresh = [PackedDataset(dataset, 4, seed=5, shuffle_samples=True).sample(index) for index in indices]
        packed = PackedDataset(dataset, 4, seed=5, shuffle_samples=True)
        with ThreadPoolExecutor(4) as executor:
            threaded = list(executor.map(packed.sample, indices))
    for one, other in zip(fresh, threaded, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_epochs_and_seeds_differ(tmp_path):
    dataset = numbered_dataset(tmp_path, [5] * 40)
    orders = [
        np.concatenate([tokens for tokens, _, _ in epoch_samples(PackedDataset(dataset, 5, seed), epoch)]).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(order) for order in orders}) == 3


def test_the_order_is_pinned():
    """Changing it would silently change what a resumed run reads."""
    assert permutation(8, seed=1234, epoch=3, stream=0).tolist() == PINNED[0]
    assert permutation(8, seed=1234, epoch=3, stream=1).tolist() == PINNED[1]


PINNED = ([3, 5, 6, 4, 7, 1, 2, 0], [5, 4, 6, 3, 7, 2, 0, 1])


def test_the_shuffle_is_uniform():
    """Chi-squared of item against place over 6,000 epochs, 25 degrees of freedom: above 60 has probability 1e-4."""
    counts = np.zeros((6, 6))
    for epoch in range(6000):
        counts[permutation(6, seed=99, epoch=epoch, stream=0), np.arange(6)] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 60


def test_all_orders_of_three_are_equally_likely():
    counts = np.zeros(27)
    for seed in range(6000):
        counts[permutation(3, seed=seed, epoch=0, stream=1) @ (9, 3, 1)] += 1
    orders = counts[counts > 0]
    assert len(orders) == 6
    assert ((orders - 1000) ** 2 / 1000).sum() < 26  # 5 degrees of freedom: probability 1e-4


@pytest.mark.parametrize(("sequence_length", "seed", "message"), [(0, 0, "sequence_length"), (4, -1, "seed"), (4, 2**64, "seed")])
def test_arguments_out_of_range(tmp_path, sequence_length, seed, message):
    with pytest.raises(ValueError, match=message):
        PackedDataset(numbered_dataset(tmp_path, [5]), sequence_length, seed)
