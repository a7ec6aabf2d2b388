"""A dataset is there whole or not at all, and a damaged or unfit one is refused with a message that says why."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.kill import ends_before
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.indexed import write_index
from w1train.data.tokenizer import train_tokenizer
from w1train.data.writer import DatasetWriter

DOCUMENTS = [[20, 21, 22], [299], [30] * 50]


@pytest.fixture(scope="module")
def written(make_dataset, tmp_path_factory):
    """Prefix of a dataset that no test changes."""
    return make_dataset(tmp_path_factory.mktemp("written") / "data.v1", DOCUMENTS).prefix


@pytest.fixture
def prefix(written, tmp_path):
    """Prefix of a copy that a test may damage."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(written + suffix, tmp_path / f"data.v1{suffix}")
    return tmp_path / "data.v1"


def change_manifest(prefix, **changes):
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_contents(written, tokenizer):
    dataset = TokenDataset.open(written, tokenizer, vocab_size=300)
    documents = [[*ids, tokenizer.eos_token_id] for ids in DOCUMENTS]
    assert [dataset.document_tokens(i).tolist() for i in range(dataset.num_documents)] == documents
    assert dataset.document_tokens(2, 1, 4).tolist() == [30, 30, 30]
    dataset.verify_hashes()
    manifest = dataset.manifest
    assert (manifest.num_documents, manifest.num_tokens, manifest.num_bytes, manifest.dtype) == (3, 57, 54, "uint16")
    assert (manifest.max_token_id, manifest.eos_token_id, manifest.mask_token_id) == (299, 1, 14)
    counts = Counter(token for ids in documents for token in ids)
    bits = sum(-count * math.log2(count / 57) for count in counts.values())
    assert manifest.unigram_bits_per_byte == pytest.approx(bits / 54, rel=1e-12)


def test_missing_files(prefix):
    Path(f"{prefix}.idx").unlink()
    with pytest.raises(DatasetError, match=r"data\.v1\.idx missing"):
        TokenDataset.open(prefix)
    Path(f"{prefix}.bin").rename(f"{prefix}.bin.partial")
    with pytest.raises(DatasetError, match=r"data\.v1\.bin and .*data\.v1\.idx missing; w1train data tokenize is still writing it"):
        TokenDataset.open(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("change", [-1, 2])
def test_truncated_and_overlong_files(prefix, suffix, with_manifest, change):
    path = Path(f"{prefix}{suffix}")
    size = path.stat().st_size
    os.truncate(path, size + change)
    if not with_manifest:
        Path(f"{prefix}.json").unlink()
    fault = "truncated" if change < 0 else "longer than"
    with pytest.raises(DatasetError, match=rf"data\.v1\{suffix} is {fault}.*: {size + change} bytes, expected {size}"):
        TokenDataset.open(prefix)


@given(st.integers(min_value=0))
def test_an_index_cut_anywhere_is_refused(written, cut):
    with tempfile.TemporaryDirectory() as directory:
        for suffix in (".bin", ".idx"):
            shutil.copy(written + suffix, Path(directory, "x" + suffix))
        path = Path(directory, "x.idx")
        os.truncate(path, cut % path.stat().st_size)
        with pytest.raises(DatasetError, match=r"x\.idx is truncated"):
            TokenDataset.open(Path(directory, "x"))


def open_and_verify(prefix, hashes):
    dataset = TokenDataset.open(prefix)
    if hashes:
        dataset.verify_hashes()


@given(st.data())
def test_a_flipped_bit_is_found(written, data):
    """In the index when it is opened; in the tokens at the latest when the hashes are compared."""
    suffix = data.draw(st.sampled_from([".bin", ".idx"]))
    with tempfile.TemporaryDirectory() as directory:
        for name in (".bin", ".idx", ".json"):
            shutil.copy(written + name, Path(directory, "x" + name))
        path = Path(directory, "x" + suffix)
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=rf"x\{suffix}"):
            open_and_verify(Path(directory, "x"), hashes=suffix == ".bin")


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_index(written, content):
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(written + ".bin", Path(directory, "x.bin"))
        for start in (b"", b"MMIDIDX\x00\x00" + b"\x01" + b"\x00" * 7):
            Path(directory, "x.idx").write_bytes(start + content)
            with pytest.raises(DatasetError, match=r"x\.idx"):
                TokenDataset.open(Path(directory, "x"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no dataset manifest"),
        ("[]", "is no dataset manifest: it has no JSON object at its top"),
        ('{"format_version": 2}', r"format version 1 \(found 2\)"),
        ('{"format_version": 1}', "'bin_num_bytes' is missing"),
    ],
)
def test_damaged_manifest(prefix, content, message):
    Path(f"{prefix}.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        TokenDataset.open(prefix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": "many"}, "num_tokens is 'many'"),
        ({"colour": "red"}, "key 'colour' is unknown"),
        ({"num_tokens": 56}, "num_tokens is 57, expected 56"),
        ({"num_documents": 4}, "num_documents is 3, expected 4"),
        ({"dtype": "int32"}, "dtype is uint16, expected int32"),
    ],
)
def test_manifest_of_something_else(prefix, changes, message):
    change_manifest(prefix, **changes)
    with pytest.raises(DatasetError, match=message):
        TokenDataset.open(prefix)


def test_another_tokenizer(written, tokenizer):
    other = train_tokenizer(["other text"], vocab_size=280)
    with pytest.raises(DatasetError, match=rf"{tokenizer.fingerprint}.*the run uses {other.fingerprint}"):
        TokenDataset.open(written, other)


def test_tokens_beyond_the_vocabulary(written):
    with pytest.raises(DatasetError, match="holds token id 299, outside the model's vocabulary of 299 ids"):
        TokenDataset.open(written, vocab_size=299)


def test_tokens_beyond_the_vocabulary_are_found_while_reading(prefix, caplog):
    """Without a manifest, nothing else stands between them and the embedding table."""
    Path(f"{prefix}.json").unlink()
    with caplog.at_level(logging.WARNING):
        dataset = TokenDataset.open(prefix, vocab_size=299)
    assert "not checked beforehand" in caplog.text
    assert dataset.document_tokens(0).tolist() == [20, 21, 22, 1]
    with pytest.raises(DatasetError, match="token 0 of document 1 is 299, outside the model's vocabulary of 299 ids"):
        dataset.document_tokens(1)


def test_writer_refuses_an_existing_dataset(prefix, tokenizer, make_dataset):
    with pytest.raises(DatasetError, match="exists already"):
        DatasetWriter(prefix, tokenizer)
    assert make_dataset(prefix, [[40]]).num_documents == 1


def test_two_writers_of_one_dataset(tmp_path, tokenizer):
    with DatasetWriter(tmp_path / "x", tokenizer) as first:
        with pytest.raises(DatasetError, match="another process is writing"):
            DatasetWriter(tmp_path / "x", tokenizer)
        first.add_document([20], 1)
        first.finalize()
    assert TokenDataset.open(tmp_path / "x").num_documents == 1


def test_an_error_leaves_nothing(tmp_path, tokenizer):
    def fail_halfway():
        with DatasetWriter(tmp_path / "x", tokenizer) as unfinished:
            unfinished.add_document([20], 1)
            raise KeyError("the text")

    with pytest.raises(KeyError, match="the text"):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


def test_no_documents(tmp_path, tokenizer):
    with DatasetWriter(tmp_path / "x", tokenizer) as empty, pytest.raises(DatasetError, match="would be empty"):
        empty.finalize()
    assert list(tmp_path.iterdir()) == []


def test_stopped_between_any_two_steps(written, tokenizer, monkeypatch, tmp_path):
    """What a reader finds is the old dataset, nothing, or the new one; never a mixture."""
    old, new = [[*ids, 1] for ids in DOCUMENTS], [[40, 41, 1]]
    outcomes = []
    for fatal_call in itertools.count(1):
        prefix = tmp_path / str(fatal_call)
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(written + suffix, f"{prefix}{suffix}")
        new_writer = DatasetWriter(prefix, tokenizer, overwrite=True)
        new_writer.add_document([40, 41], 2)
        completed = ends_before(fatal_call, new_writer.finalize, monkeypatch)
        try:
            dataset = TokenDataset.open(prefix)
            found = [dataset.document_tokens(i).tolist() for i in range(dataset.num_documents)]
        except DatasetError:
            found = None
        assert found in (old, None, new)
        outcomes.append(found)
        if completed:
            break
    assert outcomes[0] == old
    assert outcomes[-1] == new
    assert len(outcomes) > 8


def test_large_vocabularies_take_four_bytes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 70_000)
    with DatasetWriter(tmp_path / "x", tokenizer) as wide:
        wide.add_document([69_999, 20], 2)
        assert wide.finalize().dtype == "int32"
    assert np.array_equal(TokenDataset.open(tmp_path / "x").document_tokens(0), [69_999, 20, 1])


def test_the_document_of_every_token(make_dataset, tmp_path):
    """Over several landmarks, against counting; and in a foreign dataset whose documents are of several sequences or of none."""
    dataset = make_dataset(tmp_path / "x", [[20] * (1 + 7 * i % 5) for i in range(1500)])
    lengths = np.diff(dataset.document_offsets)
    owners = np.repeat(np.arange(1500), lengths)
    assert [dataset.document_offsets.document_of(token) for token in range(dataset.num_tokens)] == owners.tolist()
    assert dataset.document_offsets[1499:].tolist() == [dataset.document_offsets[1499], dataset.num_tokens]
    assert len(dataset.document_offsets[:]) == 1501

    with open(tmp_path / "y.idx", "wb") as file:
        write_index(file, np.dtype("int32"), np.array([2, 3, 4], dtype=np.int32))
    content = bytearray((tmp_path / "y.idx").read_bytes())
    content[-32:] = np.array([0, 2, 2, 3], dtype="<i8").tobytes()  # documents of two sequences, none and one
    (tmp_path / "y.idx").write_bytes(content)
    np.arange(9, dtype=np.int32).tofile(tmp_path / "y.bin")
    foreign = TokenDataset.open(tmp_path / "y")
    assert foreign.document_offsets[:].tolist() == [0, 5, 5, 9]
    assert [foreign.document_offsets.document_of(token) for token in range(9)] == [0] * 5 + [2] * 4
