"""Writes a dataset that appears under its name only when it is complete."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from w1train import __version__
from w1train.data.indexed import DatasetError, bin_path, idx_path, token_dtype, write_index
from w1train.data.manifest import DatasetManifest, manifest_path
from w1train.data.tokenizer import Tokenizer
from w1train.runtime.files import PARTIAL_SUFFIX, sync_directory

_FLUSH_TOKENS = 1 << 18


class DatasetWriter:
    """Documents in, PREFIX.bin, PREFIX.idx and PREFIX.json out, in constant memory but for 4 bytes a document.

    Use as a context manager: leaving it without :meth:`finalize` throws away what was written. A killed process leaves at most
    ``*.partial`` files, which the next writer of the same prefix replaces.
    """

    def __init__(self, prefix: str | Path, tokenizer: Tokenizer, overwrite: bool = False) -> None:
        """Raises:
        DatasetError: if the dataset exists and ``overwrite`` is not set, or another process is writing it.
        """
        self._prefix = str(prefix)
        self._tokenizer = tokenizer
        if not overwrite and manifest_path(prefix).exists():
            raise DatasetError(f"dataset {prefix} exists already; choose another name or overwrite it")
        self._bin_partial = Path(f"{bin_path(prefix)}{PARTIAL_SUFFIX}")
        self._idx_partial = Path(f"{idx_path(prefix)}{PARTIAL_SUFFIX}")
        self._bin_partial.parent.mkdir(parents=True, exist_ok=True)
        self._bin_file: BinaryIO | None = _open_exclusively(self._bin_partial)
        self._bin_hash = hashlib.sha256()
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._buffer: list[NDArray[np.integer]] = []
        self._num_buffered = 0
        self._lengths = array("i")
        self._token_counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._num_text_bytes = 0

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add_document(self, token_ids: Sequence[int], num_text_bytes: int) -> None:
        """Append a document's tokens (at least one, no mask) and EOS; ``num_text_bytes`` is the length of its text in UTF-8.

        Raises:
            DatasetError: if it has more tokens than the index format can say (2^31 - 1).
        """
        assert len(token_ids) > 0, "an empty document"
        assert num_text_bytes > 0, "a document without text"
        tokens = np.empty(len(token_ids) + 1, dtype=self._dtype)
        tokens[:-1] = token_ids
        tokens[-1] = self._tokenizer.eos_token_id
        if len(tokens) > np.iinfo(np.int32).max:
            raise DatasetError(f"document {self.num_documents} of {self._prefix} has {len(tokens)} tokens; the format allows 2^31 - 1")
        self._lengths.append(len(tokens))
        self._num_text_bytes += num_text_bytes
        self._buffer.append(tokens)
        self._num_buffered += len(tokens)
        if self._num_buffered >= _FLUSH_TOKENS:
            self._flush()

    def finalize(self) -> DatasetManifest:
        """Make the dataset visible: flush both files to the disk, rename them, and write the manifest last.

        Raises:
            DatasetError: if no document was added.
            OSError: if the disk is full or fails; nothing is left under the dataset's name then.
        """
        if not self._lengths:
            raise DatasetError(f"dataset {self._prefix} would be empty")
        assert self._bin_file is not None
        self._flush()
        self._bin_file.flush()
        os.fsync(self._bin_file.fileno())
        with open(self._idx_partial, "wb") as idx_file:
            write_index(idx_file, self._dtype, np.asarray(self._lengths))
            idx_file.flush()
            os.fsync(idx_file.fileno())
        manifest = self._manifest()
        self._publish(manifest)
        return manifest

    def _publish(self, manifest: DatasetManifest) -> None:
        """An older dataset goes first, manifest before files, so that no mixture of the two ever counts as one."""
        directory = self._bin_partial.parent
        manifest_path(self._prefix).unlink(missing_ok=True)
        idx_path(self._prefix).unlink(missing_ok=True)
        sync_directory(directory)
        os.replace(self._bin_partial, bin_path(self._prefix))
        os.replace(self._idx_partial, idx_path(self._prefix))
        sync_directory(directory)
        manifest.write(manifest_path(self._prefix))
        self._close()

    def _flush(self) -> None:
        if not self._buffer:
            return
        assert self._bin_file is not None
        tokens = np.concatenate(self._buffer)
        assert tokens.max() < len(self._token_counts), "a token id outside the tokenizer's vocabulary"
        self._token_counts += np.bincount(tokens, minlength=len(self._token_counts))
        content = tokens.astype(self._dtype.newbyteorder("<"), copy=False).tobytes()
        self._bin_hash.update(content)
        self._bin_file.write(content)
        self._buffer, self._num_buffered = [], 0

    def _manifest(self) -> DatasetManifest:
        assert self._token_counts[self._tokenizer.mask_token_id] == 0, "a document holds the mask token"
        with open(self._idx_partial, "rb") as idx_file:
            idx_sha256 = hashlib.file_digest(idx_file, "sha256").hexdigest()
        return DatasetManifest(
            created_by=f"w1train {__version__}",
            num_documents=self.num_documents,
            num_tokens=int(self._token_counts.sum()),
            num_bytes=self._num_text_bytes,
            dtype=self._dtype.name,
            max_token_id=int(np.flatnonzero(self._token_counts)[-1]),
            unigram_bits_per_byte=unigram_bits(self._token_counts) / self._num_text_bytes,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            tokenizer_vocab_size=self._tokenizer.vocab_size,
            eos_token_id=self._tokenizer.eos_token_id,
            mask_token_id=self._tokenizer.mask_token_id,
            bin_num_bytes=self._bin_partial.stat().st_size,
            bin_sha256=self._bin_hash.hexdigest(),
            idx_num_bytes=self._idx_partial.stat().st_size,
            idx_sha256=idx_sha256,
        )

    def _close(self) -> None:
        if self._bin_file is not None:
            self._bin_file.close()
            self._bin_file = None

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bin_file is None:
            return
        self._bin_partial.unlink(missing_ok=True)
        self._idx_partial.unlink(missing_ok=True)
        self._close()


def unigram_bits(token_counts: NDArray[np.int64]) -> float:
    """Bits of a text under the order-0 model of its own token frequencies; ``token_counts`` int64 [vocab_size]."""
    counts = token_counts[token_counts > 0].astype(np.float64)
    return float(math.fsum(counts * -np.log2(counts / counts.sum())))


def _open_exclusively(path: Path) -> BinaryIO:
    """Open a file for writing that no other process has open for writing through this function.

    The lock ends with the process, however it ends. The name is looked up again under the lock: the other writer may have
    finished and renamed the file in between, and emptying it then would destroy its dataset.
    """
    file = open(path, "ab")  # noqa: SIM115 (the lock lives as long as the file is open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
            raise BlockingIOError
    except BlockingIOError:
        file.close()
        raise DatasetError(f"another process is writing {path}") from None
    file.truncate(0)
    return file
