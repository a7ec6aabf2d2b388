"""A dataset of tokenized documents, opened for reading after its files have been checked."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from w1train.data.indexed import DatasetError, Index, bin_path, file_size, idx_path, read_index
from w1train.data.manifest import DatasetManifest, manifest_path
from w1train.data.tokenizer import Tokenizer
from w1train.runtime.files import PARTIAL_SUFFIX

__all__ = ["DatasetError", "TokenDataset"]

logger = logging.getLogger(__name__)


class TokenDataset:
    """Documents of token ids, memory-mapped: PREFIX.bin, PREFIX.idx and, unless foreign, PREFIX.json.

    Open with :meth:`open`, which checks; the constructor does not.
    """

    def __init__(self, prefix: str, index: Index, manifest: DatasetManifest | None, vocab_size: int | None) -> None:
        self.prefix = prefix
        self.manifest = manifest
        """None for a foreign dataset."""
        self.document_offsets: NDArray[np.int64] = index.document_offsets()
        """int64 [num_documents + 1]: first token of each document, and num_tokens."""
        self.num_documents: int = index.num_documents
        self.num_tokens: int = int(self.document_offsets[-1])
        self._vocab_size = vocab_size
        self._tokens: NDArray[np.integer] = np.memmap(bin_path(prefix), dtype=index.dtype, mode="r")

    @classmethod
    def open(cls, prefix: str | Path, tokenizer: Tokenizer | None = None, vocab_size: int | None = None) -> TokenDataset:
        """Check a dataset against its manifest, the run's tokenizer and the model's vocabulary, then open it.

        A dataset without PREFIX.json (made by Megatron-LM, say) is opened with fewer checks, which the log says.
        Hashes are not compared here, on every rank, since that reads every byte: see :meth:`verify_hashes`, which a run calls on one.

        Raises:
            DatasetError: if a file is missing, truncated or inconsistent, the dataset was made with another tokenizer, or
                it holds token ids that the vocabulary has not.
        """
        prefix = str(prefix)
        _check_exists(prefix)
        manifest = DatasetManifest.read(manifest_path(prefix)) if manifest_path(prefix).exists() else None
        if manifest is not None:
            _check_size(idx_path(prefix), manifest.idx_num_bytes, manifest_path(prefix))
            _check_size(bin_path(prefix), manifest.bin_num_bytes, manifest_path(prefix))
        index = read_index(idx_path(prefix))
        if index.num_bin_bytes == 0:
            raise DatasetError(f"dataset {prefix} holds no tokens")
        if manifest is None:
            _check_size(bin_path(prefix), index.num_bin_bytes, idx_path(prefix))
            logger.warning(
                "%s is missing: the dataset is taken as made by other software; its tokenizer, its completeness and its largest "
                "token id are not checked beforehand (token ids are, as they are read)",
                manifest_path(prefix),
            )
        else:
            _check_counts(prefix, manifest, index)
            _check_fits(prefix, manifest, tokenizer, vocab_size)
        return cls(prefix, index, manifest, vocab_size)

    def document_tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer]:
        """Tokens [start, stop) of a document, read-only, in the file's dtype; by default all of it.

        Raises:
            DatasetError: if one of them is outside the vocabulary.
        """
        first = int(self.document_offsets[document])
        length = int(self.document_offsets[document + 1]) - first
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length, (document, start, stop, length)
        tokens = self._tokens[first + start : first + stop]
        if self._vocab_size is not None and len(tokens):
            self._check_vocabulary(tokens, self._vocab_size, document, start)
        return tokens

    def verify_hashes(self) -> None:
        """Read both files and compare their sha256 with the manifest's.

        Raises:
            DatasetError: if the content of a file has changed since it was written, or there is no manifest.
        """
        if self.manifest is None:
            raise DatasetError(f"dataset {self.prefix} has no manifest to compare its files with")
        for path, expected in ((bin_path(self.prefix), self.manifest.bin_sha256), (idx_path(self.prefix), self.manifest.idx_sha256)):
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise DatasetError(f"{path} is corrupt: its sha256 is {found}, the manifest has {expected}")

    def _check_vocabulary(self, tokens: NDArray[np.integer], vocab_size: int, document: int, start: int) -> None:
        """Catches, before an embedding lookup reads past its table, what the manifest cannot: damage and foreign datasets."""
        if tokens.min() >= 0 and tokens.max() < vocab_size:
            return
        offset = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
        raise DatasetError(
            f"{bin_path(self.prefix)}: token {start + offset} of document {document} is {tokens[offset]}, "
            f"outside the model's vocabulary of {vocab_size} ids"
        )


def _check_exists(prefix: str) -> None:
    missing = [str(path) for path in (bin_path(prefix), idx_path(prefix)) if not path.exists()]
    if not missing:
        return
    message = f"dataset {prefix} is not there: {' and '.join(missing)} missing"
    if Path(f"{bin_path(prefix)}{PARTIAL_SUFFIX}").exists():
        message += "; data_tools.tokenize is still writing it, or was interrupted (then run it again)"
    raise DatasetError(message)


def _check_size(path: Path, expected: int, source: Path) -> None:
    found = file_size(path)
    if found != expected:
        fault = "truncated" if found < expected else "longer than it was written"
        raise DatasetError(f"{path} is {fault}: {found} bytes, expected {expected} ({source.name} says so)")


def _check_counts(prefix: str, manifest: DatasetManifest, index: Index) -> None:
    """The manifest and the index must describe the same dataset, with one sequence a document."""
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
    if not np.array_equal(index.document_indices, np.arange(index.num_documents + 1)):
        raise DatasetError(f"{idx_path(prefix)} is corrupt: a document is not one sequence")


def _check_fits(prefix: str, manifest: DatasetManifest, tokenizer: Tokenizer | None, vocab_size: int | None) -> None:
    if tokenizer is not None and manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DatasetError(
            f"dataset {prefix} was tokenized with the tokenizer of sha256 {manifest.tokenizer_fingerprint} "
            f"({manifest.tokenizer_vocab_size} ids), the run uses {tokenizer.fingerprint} ({tokenizer.vocab_size} ids)"
        )
    if vocab_size is not None and manifest.max_token_id >= vocab_size:
        raise DatasetError(f"dataset {prefix} holds token id {manifest.max_token_id}, outside the model's vocabulary of {vocab_size} ids")
