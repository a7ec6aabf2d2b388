"""megatron-core reads what is written here, and the other way round."""

from __future__ import annotations

import os

import numpy as np
import pytest

from w1train.data.dataset import TokenDataset
from w1train.data.indexed import token_dtype, write_index

DOCUMENTS = [[5, 6, 7], [299], [8] * 1000, [9, 10]]


@pytest.fixture(scope="module")
def megatron():
    """megatron-core's module (its import takes many seconds)."""
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def test_megatron_reads_our_files(megatron, make_dataset, tmp_path, tokenizer):
    ours = make_dataset(tmp_path / "ours", DOCUMENTS)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == len(DOCUMENTS) == ours.num_documents
    for i, ids in enumerate(DOCUMENTS):
        assert theirs[i].tolist() == [*ids, tokenizer.eos_token_id] == ours.document_tokens(i).tolist()
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_our_index_is_megatrons_byte_for_byte(megatron, tmp_path, dtype):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for ids in DOCUMENTS:
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    with open(tmp_path / "ours.idx", "wb") as file:
        write_index(file, np.dtype(dtype), np.array([len(ids) for ids in DOCUMENTS], dtype=np.int32))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatrons_files(megatron, tmp_path, dtype, caplog):
    """Documents of several sequences and of none included."""
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    builder.add_document(np.array([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(np.array([], dtype=np.int64), [])
    builder.add_document(np.array([6]), [1])
    builder.add_document(np.array([], dtype=np.int64), [0])
    builder.finalize(str(tmp_path / "theirs.idx"))
    dataset = TokenDataset.open(tmp_path / "theirs", vocab_size=7)
    assert [dataset.document_tokens(i).tolist() for i in range(4)] == [[1, 2, 3, 4, 5], [], [6], []]
    assert dataset.manifest is None
    assert "theirs.json is missing" in caplog.text


def test_token_dtype_is_megatrons_choice(megatron):
    for vocab_size in (300, 65499, 65500, 64512, 150_000):
        assert token_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)


def test_index_of_more_than_2_to_31_tokens(tmp_path):
    """Byte offsets are 64-bit; the token file is sparse and takes no room."""
    lengths = np.full(3, 2**30, dtype=np.int32)
    with open(tmp_path / "big.idx", "wb") as file:
        write_index(file, np.dtype("uint16"), lengths)
    with open(tmp_path / "big.bin", "wb") as file:
        os.truncate(file.fileno(), 3 * 2**31)
        file.seek(-4, os.SEEK_END)
        file.write(np.array([11, 12], dtype="<u2").tobytes())
    dataset = TokenDataset.open(tmp_path / "big")
    assert dataset.num_tokens == 3 * 2**30
    assert dataset.document_tokens(2, 2**30 - 2).tolist() == [11, 12]
