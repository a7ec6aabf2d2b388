"""A dataset of tokenized documents, which is opened for reading after its files have been checked."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from w1train.data.dataset_manifest import DatasetManifest, manifest_path
from w1train.data.file_reader import FileReader
from w1train.data.indexed import DatasetError, Index, bin_path, chunks, file_size, idx_path, may_be_noised_path, read_index
from w1train.data.tokenizer import Tokenizer
from w1train.runtime.files import PARTIAL_SUFFIX, errors_named

__all__ = ["DatasetError", "TokenDataset"]

logger = logging.getLogger(__name__)

_LANDMARK_STEP = 512
_LANDMARKS_AT_ONCE = 1 << 12


class DocumentOffsets:
    """The first token of each document in PREFIX.bin, followed by the number of tokens; it is indexed like an array of num_documents + 1
    items.

    The offsets of a hundred million documents would take about a gigabyte on each rank. So every 512th offset is kept in memory, and the
    offsets between are read from PREFIX.idx when they are needed. They are not mapped: the pages that are touched would add up to the whole
    file, and a mapped file that is cut short kills the process. Only for datasets whose documents have several sequences, which other
    software may write, the mapped index is searched.
    """

    def __init__(self, index: Index, path: Path) -> None:
        self._file = FileReader(path)
        self._num_documents, self._num_bin_bytes, self._itemsize = index.num_documents, index.num_bin_bytes, index.dtype.itemsize
        self._pointers_start = index.pointers_start
        self.one_sequence_each = _documents_are_sequences(index)
        """This flag tells whether each document is one sequence, as in all datasets that w1train writes."""
        self._landmarks = _landmarks(index) if self.one_sequence_each else None
        # A mapped file counts as an open file, and a dataset may have hundreds of shards.
        self._mapped = None if self.one_sequence_each else index

    def __len__(self) -> int:
        return self._num_documents + 1

    @overload
    def __getitem__(self, document: int) -> int: ...

    @overload
    def __getitem__(self, document: slice) -> NDArray[np.int64]: ...

    def __getitem__(self, document: int | slice) -> int | NDArray[np.int64]:
        if isinstance(document, slice):
            start, stop, step = document.indices(len(self))
            if stop <= start:
                return np.zeros(0, dtype=np.int64)
            return self._between(start, stop)[::step] // self._itemsize
        return int(self._between(document, document + 1)[0]) // self._itemsize

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[np.int64]:
        return np.asarray(self[:], dtype=dtype)

    def document_of(self, token: int) -> int:
        """Return the document that a token belongs to."""
        return self.around(token, token + 1)[0]

    def around(self, start: int, stop: int) -> tuple[int, NDArray[np.int64]]:
        """Return which documents the tokens [start, stop) belong to.

        Returns:
            The number of the first of these documents, and an array of the first token of each of them followed by the end of the last
            document.
        """
        itemsize = self._itemsize
        if self._landmarks is None:
            first, last = (bisect_right(self, token, 0, len(self)) - 1 for token in (start, stop - 1))
            return first, self[first : last + 2]
        places = (start * itemsize, (stop - 1) * itemsize)
        low, high = (self._landmarks.searchsorted(places, side="right") - 1).tolist()
        begin = low * _LANDMARK_STEP
        block = self._between(begin, min((high + 1) * _LANDMARK_STEP, len(self) - 1) + 1)
        first, last = (block.searchsorted(places, side="right") - 1).tolist()
        return begin + first, block[first : last + 2] // itemsize

    def bounds(self, documents: Iterable[int]) -> NDArray[np.int64]:
        """Return where each document begins and ends, int64 [documents, 2]."""
        return np.array([self._between(document, document + 2) for document in documents]) // self._itemsize

    def _between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the bytes of PREFIX.bin at which the documents [start, stop) begin."""
        if self._mapped is not None:
            self._check_length(self._mapped)
            return self._mapped.pointers_of(slice(start, stop))
        num_inside = min(stop, len(self) - 1) - start
        inside = np.frombuffer(self._file.read(8 * num_inside, self._pointers_start + 8 * start), dtype="<i8")
        return inside if start + num_inside == stop else np.append(inside, self._num_bin_bytes)

    def _check_length(self, index: Index) -> None:
        """Raise DatasetError if PREFIX.idx has become shorter: a read of mapped memory after the end of the file would kill the process."""
        found = self._file.size()
        if found < len(index.mapped):
            raise DatasetError(f"{self._file.path} was truncated while it was in use: it has {found} bytes, and had {len(index.mapped)}")


def _landmarks(index: Index) -> NDArray[np.int64]:
    """Return the byte at which every 512th sequence begins."""
    found = np.empty(-(-len(index.sequence_pointers) // _LANDMARK_STEP), dtype=np.int64)
    for start in range(0, len(found), _LANDMARKS_AT_ONCE):
        part = found[start : start + _LANDMARKS_AT_ONCE]
        part[:] = index.sequence_pointers[start * _LANDMARK_STEP :: _LANDMARK_STEP][: len(part)]
        index.release_pages()
    return found


def _documents_are_sequences(index: Index) -> bool:
    if index.num_documents != len(index.sequence_lengths):
        return False
    for chunk in chunks(index.num_documents + 1):
        if not np.array_equal(index.document_indices[chunk], np.arange(chunk.start, chunk.stop)):
            return False
        index.release_pages()
    return True


class TokenDataset:
    """A dataset of documents of token ids: PREFIX.bin, PREFIX.idx and, unless other software wrote it, PREFIX.json.

    Open it with :meth:`open`, which checks the files; the constructor does not. Tokens are read, not mapped: a mapped file that is cut
    short, or whose file system fails, kills the process without a message. Several threads and forked processes may use one object.
    """

    def __init__(
        self, prefix: str, index: Index, offsets: DocumentOffsets, manifest: DatasetManifest | None, vocab_size: int | None
    ) -> None:
        self.prefix = prefix
        self.manifest = manifest
        """The content of PREFIX.json; None for a dataset that other software wrote."""
        self.document_offsets = offsets
        """The first token of each document, and num_tokens; num_documents + 1 items."""
        self.num_documents: int = index.num_documents
        self.num_tokens: int = index.num_bin_bytes // index.dtype.itemsize
        self._dtype = index.dtype
        self._vocab_size = vocab_size
        self._bin_file = FileReader(bin_path(prefix))
        flags = may_be_noised_path(prefix)
        self._may_be_noised_file = FileReader(flags) if flags.exists() else None

    @classmethod
    def open(cls, prefix: str | Path, tokenizer: Tokenizer | None = None, vocab_size: int | None = None) -> TokenDataset:
        """Check a dataset against its manifest, the run's tokenizer and the model's vocabulary, and open it.

        A dataset without PREFIX.json, which other software such as Megatron-LM wrote, gets fewer checks, which the log mentions.
        This method does not compare hashes, because every rank calls it and a comparison reads every byte. A run calls
        :meth:`verify_hashes` on one rank.

        Raises:
            DatasetError: if a file is missing, truncated or inconsistent, the dataset was made with another tokenizer, or
                it contains token ids outside the vocabulary.
        """
        prefix = str(prefix)
        manifest = read_manifest(prefix)
        index = read_index(idx_path(prefix))
        if index.num_bin_bytes == 0:
            raise DatasetError(f"dataset {prefix} holds no tokens")
        offsets = DocumentOffsets(index, idx_path(prefix))
        if manifest is None:
            _check_size(bin_path(prefix), index.num_bin_bytes, idx_path(prefix))
            logger.warning(
                "%s is missing, so the dataset counts as written by other software: its tokenizer, its completeness and its largest "
                "token id are not checked beforehand. Token ids are checked when they are read",
                manifest_path(prefix),
            )
        else:
            _check_counts(prefix, manifest, index, offsets)
            check_fits(prefix, manifest, tokenizer, vocab_size)
        _check_may_be_noised(prefix, manifest, index)
        return cls(prefix, index, offsets, manifest, vocab_size)

    @property
    def parts(self) -> Sequence[TokenDataset]:
        """Return the datasets that this dataset consists of: itself, or its shards."""
        return [self]

    def __reduce__(self) -> tuple[Callable[..., TokenDataset], tuple[object, ...]]:
        """Let another process open the files again: open files cannot be pickled, and mapped files would be pickled whole."""
        return TokenDataset.open, (self.prefix, None, self._vocab_size)

    def document_tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer]:
        """Return the tokens [start, stop) of a document, by default all of them, as a read-only array of the file's dtype.

        Raises:
            DatasetError: if a token is outside the vocabulary.
        """
        first, end = self.document_offsets[document], self.document_offsets[document + 1]
        length = end - first
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length, (document, start, stop, length)
        return self.read(first + start, first + stop)

    def read(self, start: int, stop: int) -> NDArray[np.integer]:
        """Return the tokens [start, stop) of PREFIX.bin as a read-only array of the file's dtype.

        Raises:
            DatasetError: if a token is outside the vocabulary, or the file has become shorter since it was opened.
            OSError: if the file cannot be read, after several attempts where another attempt may help.
        """
        itemsize = self._dtype.itemsize
        tokens = np.frombuffer(self._bin_file.read((stop - start) * itemsize, start * itemsize), dtype=self._dtype)
        if self._vocab_size is not None and len(tokens):
            self._check_vocabulary(tokens, self._vocab_size, start)
        return tokens

    @property
    def limits_noise(self) -> bool:
        """Return whether the dataset says which of its tokens may be noised; if it does not, all tokens may be noised."""
        return self._may_be_noised_file is not None

    def read_may_be_noised(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return whether each of the tokens [start, stop) of PREFIX.bin may be noised, bool [stop - start].

        Raises:
            DatasetError: if a byte of PREFIX.may_be_noised is neither 0 nor 1, or the file has become shorter since it was opened.
            OSError: as :meth:`read`.
        """
        if self._may_be_noised_file is None:
            return np.ones(stop - start, dtype=np.bool_)
        flags = np.frombuffer(self._may_be_noised_file.read(stop - start, start), dtype=np.uint8)
        if len(flags) and flags.max() > 1:
            offset = int(np.argmax(flags > 1))
            raise DatasetError(
                f"{self._may_be_noised_file.path} is corrupt: the byte of token {start + offset} is {flags[offset]}, expected 0 or 1"
            )
        return flags.view(np.bool_)

    def verify_hashes(self) -> None:
        """Read the files and compare their SHA-256 with the manifest's.

        Raises:
            DatasetError: if the content of a file has changed since it was written, or the dataset has no manifest.
        """
        if self.manifest is None:
            raise DatasetError(f"dataset {self.prefix} has no manifest to compare its files with")
        for path, _, expected in self.manifest.files(self.prefix):
            with open(path, "rb") as file, errors_named(path):
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise DatasetError(f"{path} is corrupt: its sha256 is {found}, the manifest has {expected}")

    def _check_vocabulary(self, tokens: NDArray[np.integer], vocab_size: int, first: int) -> None:
        """Refuse ids outside the vocabulary before an embedding lookup reads past its table. The manifest cannot rule them out in a damaged
        file or in a dataset that other software wrote."""
        if tokens.min() >= 0 and tokens.max() < vocab_size:
            return
        offset = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
        document = self.document_offsets.document_of(first + offset)
        raise DatasetError(
            f"{bin_path(self.prefix)}: token {first + offset - self.document_offsets[document]} of document {document} is "
            f"{tokens[offset]}, outside the model's vocabulary of {vocab_size} ids"
        )


def read_manifest(prefix: str) -> DatasetManifest | None:
    """Return the manifest of a dataset, whose files are there and have the sizes in the manifest; None for a dataset that other software
    wrote.

    Raises:
        DatasetError: a file is missing or has another size.
    """
    _check_exists(prefix)
    manifest = DatasetManifest.read(manifest_path(prefix)) if manifest_path(prefix).exists() else None
    if manifest is not None:
        for file in manifest.files(prefix):
            _check_size(file.path, file.num_bytes, manifest_path(prefix))
    return manifest


def _check_exists(prefix: str) -> None:
    missing = [str(path) for path in (bin_path(prefix), idx_path(prefix)) if not path.exists()]
    if not missing:
        return
    message = f"dataset {prefix} is not there: {' and '.join(missing)} missing"
    if Path(f"{bin_path(prefix)}{PARTIAL_SUFFIX}").exists():
        message += "; w1train data tokenize is still writing it, or was interrupted (then run it again)"
    raise DatasetError(message)


def _check_size(path: Path, expected: int, source: Path) -> None:
    found = file_size(path)
    if found != expected:
        fault = "truncated" if found < expected else "longer than it was written"
        raise DatasetError(f"{path} is {fault}: {found} bytes, expected {expected} (from {source.name})")


def _check_counts(prefix: str, manifest: DatasetManifest, index: Index, offsets: DocumentOffsets) -> None:
    """Require that the manifest and the index describe the same dataset, in which each document is one sequence."""
    found = {
        "dtype": index.dtype.name,
        "num_documents": index.num_documents,
        "num_tokens": index.num_bin_bytes // index.dtype.itemsize,
        "bin_num_bytes": index.num_bin_bytes,
    }
    for name, value in found.items():
        expected = getattr(manifest, name)
        if value != expected:
            raise DatasetError(f"{idx_path(prefix)} does not belong to {manifest_path(prefix)}: {name} is {value}, expected {expected}")
    if not offsets.one_sequence_each:
        raise DatasetError(f"{idx_path(prefix)} is corrupt: a document is not one sequence")


def _check_may_be_noised(prefix: str, manifest: DatasetManifest | None, index: Index) -> None:
    """Require that PREFIX.may_be_noised, if it is there, belongs to the dataset. Without a manifest its size alone can tell."""
    path = may_be_noised_path(prefix)
    if manifest is None and path.exists():
        _check_size(path, index.num_bin_bytes // index.dtype.itemsize, idx_path(prefix))
    if manifest is not None and not manifest.may_be_noised_sha256 and path.exists():
        raise DatasetError(
            f"{path} does not belong to the dataset: {manifest_path(prefix).name} does not list it. Remove it, or write the dataset again"
        )


def check_fits(prefix: str, manifest: DatasetManifest, tokenizer: Tokenizer | None, vocab_size: int | None) -> None:
    """Compare a dataset's manifest with the run's tokenizer and the model's vocabulary.

    Raises:
        DatasetError: the dataset was made with another tokenizer, or contains token ids outside the vocabulary.
    """
    if tokenizer is not None and manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DatasetError(
            f"dataset {prefix} was tokenized with the tokenizer of sha256 {manifest.tokenizer_fingerprint} "
            f"({manifest.tokenizer_vocab_size} ids), the run uses {tokenizer.fingerprint} ({tokenizer.vocab_size} ids)"
        )
    if vocab_size is not None and manifest.max_token_id >= vocab_size:
        raise DatasetError(f"dataset {prefix} holds token id {manifest.max_token_id}, outside the model's vocabulary of {vocab_size} ids")
