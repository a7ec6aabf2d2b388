"""Functions that read and write megatron-core's token files without megatron-core, whose import takes many seconds and imports torch.

PREFIX.bin holds the tokens of all sequences, one sequence after the other. PREFIX.idx holds, little-endian and unaligned:

    9s  magic "MMIDIDX\\0\\0"      Q  version 1      B  dtype code      Q  num_sequences      Q  num_documents + 1
    int32 [num_sequences]         tokens of each sequence
    int64 [num_sequences]         byte offset of each sequence in PREFIX.bin
    int64 [num_documents + 1]     first sequence of each document, and num_sequences

The format is defined in megatron/core/datasets/indexed_dataset.py. In datasets that w1train writes, each document is one sequence.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from w1train.config.errors import UserError
from w1train.config.reading import FileContentError, require_regular
from w1train.runtime.files import errors_named

MAGIC = b"MMIDIDX\x00\x00"
PACKING_SUFFIX = ".pack"
"""The end of the names of best-fit packings. It is here for programs that do without torch, which packings import."""
VERSION = 1
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("uint8"),
    2: np.dtype("int8"),
    3: np.dtype("int16"),
    4: np.dtype("int32"),
    5: np.dtype("int64"),
    8: np.dtype("uint16"),
}
"""Integer dtypes by code. Megatron's codes 6 and 7 are floating-point types, which cannot hold tokens."""
_HEADER = struct.Struct("<9sQBQQ")
_CHECK_CHUNK = 1 << 20


class DatasetError(UserError):
    """The error of a dataset that is missing, damaged or unsuitable for the run."""


def bin_path(prefix: str | Path) -> Path:
    """Return the path of the file of tokens, PREFIX.bin."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the path of the index, PREFIX.idx, which says where each document begins in PREFIX.bin."""
    return Path(f"{prefix}.idx")


def may_be_noised_path(prefix: str | Path) -> Path:
    """Return PREFIX.may_be_noised, which says which tokens may be noised; without this file, all tokens may be noised.

    The file has one byte for each token of PREFIX.bin, in the same order: 1 if the token may be noised, 0 if it may not.
    """
    return Path(f"{prefix}.may_be_noised")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that megatron-core chooses for a vocabulary: uint16 for fewer than 65,500 ids, otherwise int32."""
    return np.dtype("uint16") if vocab_size < 65500 else np.dtype("int32")


@dataclass(frozen=True, slots=True)
class Index:
    """The memory-mapped content of a PREFIX.idx that has been checked."""

    dtype: np.dtype
    sequence_lengths: NDArray[np.int32]
    """[num_sequences]: number of tokens of each sequence."""
    sequence_pointers: NDArray[np.int64]
    """[num_sequences]: first byte of each sequence in PREFIX.bin."""
    document_indices: NDArray[np.int64]
    """[num_documents + 1]: first sequence of each document, and the number of sequences."""
    mapped: np.memmap
    """The mapped file. The arrays are views of it."""

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    @property
    def num_bin_bytes(self) -> int:
        """Return the size in bytes that PREFIX.bin must have."""
        if len(self.sequence_lengths) == 0:
            return 0
        return int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize

    @property
    def pointers_start(self) -> int:
        """Return the byte of PREFIX.idx at which the pointers to sequences begin."""
        return lengths_end(len(self.sequence_lengths))

    def pointers_of(self, documents: slice) -> NDArray[np.int64]:
        """Return the first byte in PREFIX.bin of each of some documents; int64 [documents].

        The number one past the last document counts as a document that begins where the tokens end. Ask only for a part of a large index:
        the array for all documents can have gigabytes.
        """
        sequences = self.document_indices[documents]
        starts = np.full(len(sequences), self.num_bin_bytes, dtype=np.int64)
        inside = sequences < len(self.sequence_pointers)
        starts[inside] = self.sequence_pointers[sequences[inside]]
        return starts

    def release_pages(self) -> None:
        """Give back the memory of the pages that have been read. The system maps a page again when it is next read."""
        self.mapped._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def write_index(file: BinaryIO, dtype: np.dtype, sequence_lengths: NDArray[np.int32]) -> None:
    """Write the index of a dataset in which each document is one sequence."""
    begin_index(file)
    file.write(sequence_lengths.astype("<i4", copy=False).tobytes())
    _finish_index(file, dtype, len(sequence_lengths), lambda start, stop: sequence_lengths[start:stop])


def begin_index(file: BinaryIO) -> None:
    """Leave room for the header. The int32 lengths of sequences may then be written one after the other."""
    file.seek(0)
    file.write(bytes(_HEADER.size))


def lengths_end(num_sequences: int) -> int:
    """Return the byte of the index at which the lengths of ``num_sequences`` sequences end."""
    return _HEADER.size + 4 * num_sequences


def finish_index(file: BinaryIO, dtype: np.dtype, num_sequences: int) -> None:
    """Complete an index that holds its lengths: write the pointers, one document for each sequence, and the header, in constant memory.

    ``file`` must be open for reading and writing, and must end with the lengths.
    """

    def read_lengths(start: int, stop: int) -> NDArray[np.int32]:
        file.seek(lengths_end(start))
        return np.frombuffer(file.read(4 * (stop - start)), dtype="<i4")

    _finish_index(file, dtype, num_sequences, read_lengths)


def _finish_index(file: BinaryIO, dtype: np.dtype, num_sequences: int, lengths: Callable[[int, int], NDArray[np.int32]]) -> None:
    code = next(code for code, known in DTYPES.items() if known == dtype)
    end = 0
    for start in range(0, num_sequences, _CHECK_CHUNK):
        stop = min(start + _CHECK_CHUNK, num_sequences)
        ends = end + np.cumsum(lengths(start, stop), dtype=np.int64) * dtype.itemsize
        pointers = np.concatenate([np.array([end], dtype="<i8"), ends[:-1].astype("<i8", copy=False)])
        file.seek(lengths_end(num_sequences) + 8 * start)
        file.write(pointers.tobytes())
        end = int(ends[-1])
    file.seek(lengths_end(num_sequences) + 8 * num_sequences)
    for start in range(0, num_sequences + 1, _CHECK_CHUNK):
        file.write(np.arange(start, min(start + _CHECK_CHUNK, num_sequences + 1), dtype="<i8").tobytes())
    file.seek(0)
    file.write(_HEADER.pack(MAGIC, VERSION, code, num_sequences, num_sequences + 1))
    file.seek(0, os.SEEK_END)


def read_index(path: Path) -> Index:
    """Map PREFIX.idx into memory, and check its header, its size and that its arrays agree with each other.

    Raises:
        DatasetError: if the file is not a valid index; the message names the file and the fault.
    """
    try:
        require_regular(path)
    except FileContentError as error:
        raise DatasetError(str(error)) from error
    dtype, num_sequences, num_boundaries = _read_header(path)
    num_bytes = path.stat().st_size
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if num_bytes != expected:
        fault = "truncated" if num_bytes < expected else "longer than its header says"
        raise DatasetError(f"{path} is {fault}: {num_bytes} bytes, expected {expected}")
    with errors_named(path):
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    content = mapped.view(np.ndarray)  # reading one item of a memmap takes microseconds
    pointers_start = lengths_end(num_sequences)
    pointers_end = pointers_start + 8 * num_sequences
    index = Index(
        dtype=dtype,
        sequence_lengths=content[_HEADER.size : pointers_start].view("<i4"),
        sequence_pointers=content[pointers_start:pointers_end].view("<i8"),
        document_indices=content[pointers_end:].view("<i8"),
        mapped=mapped,
    )
    _check_sequences(path, index)
    _check_documents(path, index)
    return index


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """Return the token dtype, the number of sequences and the length of document_indices."""
    with open(path, "rb") as file, errors_named(path):
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise DatasetError(f"{path} is truncated: it has {len(header)} bytes, and its header alone has {_HEADER.size}")
    magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
    if magic != MAGIC:
        raise DatasetError(f"{path} is not a Megatron index: it starts with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise DatasetError(f"{path} has version {version} of the index format, expected {VERSION}")
    if code not in DTYPES:
        raise DatasetError(f"{path} has dtype code {code}, which is not the code of an integer type: {sorted(DTYPES)}")
    if num_boundaries < 2:
        raise DatasetError(f"{path} lists no documents")
    return DTYPES[code], num_sequences, num_boundaries


def chunks(num_items: int) -> Iterator[slice]:
    """Yield slices that overlap by one item, so that each pair of neighbours is in a slice. Checks by slices need little memory."""
    for start in range(0, max(num_items, 1), _CHECK_CHUNK):
        yield slice(start, min(start + _CHECK_CHUNK + 1, num_items))


def _check_sequences(path: Path, index: Index) -> None:
    """Require that sequences follow each other without holes, which finds a flipped bit in a length or a pointer."""
    if len(index.sequence_pointers) and index.sequence_pointers[0] != 0:
        raise DatasetError(f"{path} is corrupt: its first sequence starts at byte {index.sequence_pointers[0]}, expected 0")
    for chunk in chunks(len(index.sequence_lengths)):
        lengths, pointers = index.sequence_lengths[chunk], index.sequence_pointers[chunk]
        if (lengths < 0).any():
            raise DatasetError(f"{path} is corrupt: sequence {chunk.start + int(np.argmax(lengths < 0))} has a negative length")
        ends = pointers[:-1] + lengths[:-1].astype(np.int64) * index.dtype.itemsize
        if not np.array_equal(ends, pointers[1:]):
            i = int(np.argmax(ends != pointers[1:]))
            raise DatasetError(
                f"{path} is corrupt: sequence {chunk.start + i} ends at byte {ends[i]}, but the next starts at {pointers[i + 1]}"
            )
        index.release_pages()


def _check_documents(path: Path, index: Index) -> None:
    documents, num_sequences = index.document_indices, len(index.sequence_lengths)
    if documents[0] != 0 or documents[-1] != num_sequences:
        raise DatasetError(
            f"{path} is corrupt: its documents cover sequences {documents[0]} to {documents[-1]}, expected 0 to {num_sequences}"
        )
    for chunk in chunks(len(documents)):
        boundaries = documents[chunk]
        if (boundaries[1:] < boundaries[:-1]).any():
            first = chunk.start + int(np.argmax(boundaries[1:] < boundaries[:-1]))
            raise DatasetError(f"{path} is corrupt: document {first} ends before it starts")
        index.release_pages()


def file_size(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        DatasetError: if the file does not exist.
    """
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist") from None
