"""Samples against the documents that they are made of: every token once an epoch, with its document and position."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import LENGTH, tiny_config
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.indexed import write_index
from w1train.data.packed.packing import PackedDataset
from w1train.data.packed.packing_index import BestFitDataset, PackingOptions, ensure_packing
from w1train.training.training_data import open_source, packing_options

document_lengths = st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(any)


def numbered_dataset(directory, lengths) -> TokenDataset:
    """Documents of the lengths given (0 as well), whose tokens are all different: 0, 1, 2, ..."""
    Path(directory).mkdir(exist_ok=True)
    prefix = Path(directory, "x")
    with open(f"{prefix}.idx", "wb") as file:
        write_index(file, np.dtype("int32"), np.array(lengths, dtype=np.int32))
    np.arange(sum(lengths), dtype=np.int32).tofile(f"{prefix}.bin")
    return TokenDataset.open(prefix)


def best_fit(dataset, sequence_length, seed, align=1, **options):
    packing = PackingOptions(sequence_length=sequence_length, align=align)
    ensure_packing(dataset, packing)
    return BestFitDataset(dataset, packing, seed, **options)


def epoch_samples(packed, epoch=0):
    num_samples = packed.num_samples_per_epoch
    return [packed.sample(index) for index in range(epoch * num_samples, (epoch + 1) * num_samples)]


def arrays_of(sample):
    return sample["tokens"], sample["document_ids"], sample["positions"]


def real(sample):
    """tokens, document_ids and positions without padding."""
    return tuple(array[sample["document_ids"] >= 0] for array in arrays_of(sample))


@given(document_lengths, st.integers(1, 15), st.integers(0, 2**64 - 1), st.integers(0, 3), st.sampled_from([PackedDataset, best_fit]))
def test_every_token_once_an_epoch(lengths, sequence_length, seed, epoch, packing):
    with tempfile.TemporaryDirectory() as directory:
        samples = epoch_samples(packing(numbered_dataset(directory, lengths), sequence_length, seed), epoch)
    assert sorted(np.concatenate([real(sample)[0] for sample in samples]).tolist()) == list(range(sum(lengths)))


@given(document_lengths, st.integers(1, 15), st.booleans(), st.integers(0, 2))
def test_cut_samples_follow_the_ring(lengths, sequence_length, shuffle, epoch):
    """Against the definition: a ring of tokens, cut at a document's beginning, in stretches of the sequence length."""
    with tempfile.TemporaryDirectory() as directory:
        dataset = numbered_dataset(directory, lengths)
        samples = epoch_samples(PackedDataset(dataset, sequence_length, seed=5, shuffle=shuffle), epoch)
    num_tokens = sum(lengths)
    short = [real(sample)[0].tolist() for sample in samples if len(real(sample)[0]) < sequence_length]
    assert [len(tokens) for tokens in short] == [num_tokens % sequence_length] * (num_tokens % sequence_length > 0)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum([0, *lengths])[:-1]
    cuts = set()
    for tokens, document_ids, positions in map(real, samples):
        assert np.array_equal(np.diff(tokens) % num_tokens, np.ones(len(tokens) - 1)), "neighbours on the ring"
        owners = document_of[tokens]
        assert document_ids.tolist() == np.cumsum([0, *(np.diff(owners) != 0)]).tolist()
        firsts = [int(np.argmax(document_ids == document)) for document in document_ids]
        assert positions.tolist() == [place - first for place, first in enumerate(firsts)]
        cuts.add(int(tokens[0]))
    begins = {cut for cut in cuts if {(cut + k * sequence_length) % num_tokens for k in range(len(samples))} == cuts}
    assert begins & set(starts.tolist())
    if not shuffle:
        assert [int(sample["tokens"][0]) for sample in samples] == list(range(0, num_tokens, sequence_length))


@given(document_lengths, st.sampled_from([(12, 1), (12, 3), (12, 4), (5, 1)]))
def test_best_fit_samples_hold_whole_documents(lengths, shape):
    sequence_length, align = shape
    with tempfile.TemporaryDirectory() as directory:
        dataset = numbered_dataset(directory, lengths)
        samples = epoch_samples(best_fit(dataset, sequence_length, 3, align=align))
    starts = np.repeat(np.cumsum([0, *lengths])[:-1], lengths)
    ends = np.repeat(np.cumsum(lengths), lengths)
    for tokens, document_ids, positions in map(arrays_of, samples):
        present = np.unique(document_ids[document_ids >= 0])
        assert present.tolist() == list(range(len(present)))
        for document in present:
            places = np.flatnonzero(document_ids == document)
            assert places[0] % align == 0
            assert np.array_equal(places, np.arange(places[0], places[0] + len(places)))
            assert np.array_equal(positions[places], np.arange(len(places)))
            first = int(tokens[places[0]])
            assert (first - starts[first]) % sequence_length == 0, "cut only where it must be"
            assert np.array_equal(tokens[places], np.arange(first, min(ends[first], first + sequence_length)))
        assert not tokens[document_ids < 0].any()
        assert not positions[document_ids < 0].any()


@pytest.mark.parametrize("packing", [PackedDataset, best_fit])
def test_positions_of_long_documents(tmp_path, packing):
    dataset = numbered_dataset(tmp_path, [50, 3])
    for tokens, _, positions in map(real, epoch_samples(packing(dataset, 8, 1, long_documents="continue"))):
        assert positions.tolist() == [token if token < 50 else token - 50 for token in tokens]
    for sample in epoch_samples(packing(dataset, 8, 1, long_documents="continue", max_position=20)):
        tokens, document_ids, positions = real(sample)
        assert positions.max() < 20
        for document in np.unique(document_ids):
            assert (np.diff(positions[document_ids == document]) == 1).all()
    for sample in epoch_samples(packing(dataset, 8, 1)):
        _, document_ids, positions = real(sample)
        assert all(positions[document_ids == document][0] == 0 for document in np.unique(document_ids))


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_eos_can_be_left_out(make_dataset, tokenizer, tmp_path, packing):
    documents = [[20 + i] * (1 + 5 * i % 23) for i in range(30)]
    dataset = make_dataset(tmp_path / "x", documents)
    if packing == "cut":
        samples = epoch_samples(PackedDataset(dataset, 10, 1, eos="drop"))
    else:
        options = PackingOptions(sequence_length=10, eos="drop")
        ensure_packing(dataset, options)
        samples = epoch_samples(BestFitDataset(dataset, options, 1))
    tokens = np.concatenate([real(sample)[0] for sample in samples])
    assert tokenizer.eos_token_id not in tokens
    assert sorted(tokens.tolist()) == sorted(token for document in documents for token in document)
    assert all((np.diff((sample["document_ids"] < 0).astype(int)) >= 0).all() for sample in samples), "padding is a suffix"
    with pytest.raises(DatasetError, match="no manifest"):
        PackedDataset(numbered_dataset(tmp_path / "foreign", [3]), 2, 0, eos="drop")


@pytest.mark.parametrize("sequence_length", [1, 3, 7, 21])
def test_a_sample_of_an_eos_alone_is_padding(make_dataset, tmp_path, sequence_length):
    """The last sample of an epoch is what is left over: with 22 tokens and samples of 3, 7 or 21, one EOS."""
    packed = PackedDataset(make_dataset(tmp_path / "x", [[20] * 5, [21] * 4, [22] * 10]), sequence_length, 1, eos="drop")
    for epoch in range(3):
        samples = epoch_samples(packed, epoch)
        assert any((sample["document_ids"] == -1).all() for sample in samples)
        assert sorted(np.concatenate([real(sample)[0] for sample in samples]).tolist()) == [20] * 5 + [21] * 4 + [22] * 10


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    """A dataset, and the packing's file that is damaged and mended."""
    dataset = numbered_dataset(tmp_path_factory.mktemp("damage"), [5, 4, 9, 20, 1, 7])
    return dataset, ensure_packing(dataset, PackingOptions(sequence_length=8))


@given(st.data())
def test_a_damaged_packing_is_named_or_gives_whole_samples(packed_file, data):
    """Bits of what follows the header's text; not every one of them can be noticed without reading the whole file."""
    dataset, path = packed_file
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[data.draw(st.integers(4096 - 24, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    message, samples = "", []
    try:
        samples = epoch_samples(BestFitDataset(dataset, PackingOptions(sequence_length=8), 1))
    except DatasetError as error:
        message = str(error)
    finally:
        path.write_bytes(content)
    assert str(path) in message or (samples and all((sample["document_ids"] >= 0).any() for sample in samples))


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_a_training_dataset_fills_a_sample_at_least(make_dataset, tmp_path, packing):
    config = tiny_config(data={"packing": packing})
    with pytest.raises(DatasetError, match=f"x has {LENGTH - 1} tokens, fewer than one sample of {LENGTH}"):
        open_source(make_dataset(tmp_path / "x", [[20] * (LENGTH - 2)]), config)
    enough = make_dataset(tmp_path / "y", [[20] * (LENGTH - 1)])
    if packing == "best_fit":
        ensure_packing(enough, packing_options(config))
    assert open_source(enough, config).num_samples_per_epoch == 1


@settings(max_examples=20)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=30))
def test_a_sample_depends_on_its_index_alone(indices):
    """Whatever was read before, in whatever order, from whatever thread: this is what makes resuming exact."""
    with tempfile.TemporaryDirectory() as directory:
        dataset = numbered_dataset(directory, [3, 8, 1, 5, 9])
        fresh = [PackedDataset(dataset, 4, seed=5).sample(index) for index in indices]
        packed = PackedDataset(dataset, 4, seed=5)
        with ThreadPoolExecutor(4) as executor:
            threaded = list(executor.map(packed.sample, indices))
    for one, other in zip(fresh, threaded, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("packing", [PackedDataset, best_fit])
def test_epochs_and_seeds_differ(tmp_path, packing):
    dataset = numbered_dataset(tmp_path, [5] * 40)
    orders = [
        np.concatenate([sample["tokens"] for sample in epoch_samples(packing(dataset, 5, seed), epoch)]).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(order) for order in orders}) == 3


def test_epochs_are_cut_elsewhere(tmp_path):
    """So that no document is cut in every epoch."""
    packed = PackedDataset(numbered_dataset(tmp_path, [7] * 40), 10, seed=0)
    cuts = [frozenset(int(sample["tokens"][0]) for sample in epoch_samples(packed, epoch)) for epoch in range(4)]
    assert len(set(cuts)) > 1


@pytest.mark.parametrize(
    ("sequence_length", "seed", "options", "message"),
    [(0, 0, {}, "sequence_length"), (4, -1, {}, "seed"), (4, 2**64, {}, "seed"), (4, 0, {"max_position": 3}, "max_position")],
)
def test_arguments_out_of_range(tmp_path, sequence_length, seed, options, message):
    with pytest.raises(ValueError, match=message):
        PackedDataset(numbered_dataset(tmp_path, [5]), sequence_length, seed, **options)
