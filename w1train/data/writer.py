"""The writer of a dataset, which gets its name only when it is complete, and which another process can continue after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import tokenizers
from numpy.typing import NDArray

from w1train.data.dataset_manifest import DatasetManifest, dataset_paths, manifest_path
from w1train.data.indexed import (
    DatasetError,
    begin_index,
    bin_path,
    finish_index,
    idx_path,
    lengths_end,
    may_be_noised_path,
    token_dtype,
)
from w1train.data.tokenizer import Tokenizer
from w1train.runtime.files import PARTIAL_SUFFIX, errors_named, open_in_place, open_new, sync_directory, sync_file
from w1train.runtime.locks import lock_file
from w1train.runtime.version import __version__

__all__ = ["DatasetWriter", "ResumeError", "WriterProgress", "check_sealed", "open_exclusively", "partial_paths", "publish", "unigram_bits"]

logger = logging.getLogger(__name__)

_FLUSH_TOKENS = 1 << 18
_READ_BYTES = 1 << 20


class ResumeError(DatasetError):
    """The error of an interrupted run's files that do not match its record of progress."""


@dataclass(frozen=True, slots=True)
class WriterProgress:
    """The part of a dataset that a writer had brought to the disk. A writer that is given it continues from there."""

    num_documents: int
    num_tokens: int
    num_text_bytes: int


class DatasetWriter:
    """The writer of a dataset's files PREFIX.bin, PREFIX.idx, PREFIX.json and, if wanted, PREFIX.may_be_noised, in constant memory.

    Use it as a context manager: leaving it without :meth:`finalize` or :meth:`keep` removes what was written. A killed process
    leaves only ``*.partial`` files, which the next writer of the same prefix replaces or, given ``resume``, continues.
    """

    def __init__(
        self,
        prefix: str | Path,
        tokenizer: Tokenizer,
        overwrite: bool = False,
        resume: WriterProgress | None = None,
        *,
        limits_noise: bool = False,
    ) -> None:
        """
        Args:
            limits_noise: write PREFIX.may_be_noised; every document must then come with the values for its tokens.

        Raises:
            DatasetError: if a file of the dataset exists and ``overwrite`` is not set, or another process is writing it.
            ResumeError: if the files are shorter than ``resume`` says.
        """
        self._prefix = str(prefix)
        self._tokenizer = tokenizer
        if not overwrite and (old := [path.name for path in dataset_paths(prefix) if path.exists()]):
            raise DatasetError(f"dataset {prefix} exists already ({', '.join(old)}); choose another name or overwrite it")
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._buffer: list[NDArray[np.integer]] = []
        self._num_buffered = 0
        self._num_documents = self._num_tokens = self._num_text_bytes = 0
        self._bin_hash, self._may_be_noised_hash = hashlib.sha256(), hashlib.sha256()
        self._token_counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._bin_partial, self._idx_partial, self._may_be_noised_partial = partial_paths(self._prefix)
        self._bin_partial.parent.mkdir(parents=True, exist_ok=True)
        self._bin_file: BinaryIO | None = open_exclusively(self._bin_partial)
        self._may_be_noised_file: BinaryIO | None = None
        with contextlib.ExitStack() as opened:
            opened.callback(self._bin_file.close)
            self._idx_file = opened.enter_context(_open_partial(self._idx_partial, resume))
            if limits_noise:
                self._may_be_noised_file = _open_partial(self._may_be_noised_partial, resume)
            else:  # a killed writer of the same prefix may have left the file
                self._may_be_noised_partial.unlink(missing_ok=True)
            opened.pop_all()  # without an error, all files stay open
        if resume is None:
            self._bin_file.truncate(0)
            begin_index(self._idx_file)
        else:
            self._go_on_from(resume)

    @property
    def num_documents(self) -> int:
        """Return the number of documents added so far."""
        return self._num_documents

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens added so far."""
        return self._num_tokens

    def add_document(self, token_ids: Sequence[int], num_text_bytes: int, may_be_noised: Sequence[bool] | None = None) -> None:
        """Append a document's tokens and EOS.

        Args:
            token_ids: at least one token id, and no mask token.
            num_text_bytes: the length of the document's text in UTF-8.
            may_be_noised: True for each token that may be noised; the last value is that of EOS. Only a writer with ``limits_noise``
                takes it.

        Raises:
            DatasetError: if the document has more tokens than the index format allows (2^31 - 1).
        """
        assert len(token_ids) > 0, "an empty document"
        assert num_text_bytes > 0, "a document without text"
        tokens = np.empty(len(token_ids) + 1, dtype=self._dtype)
        tokens[:-1] = token_ids
        tokens[-1] = self._tokenizer.eos_token_id
        flags = None if may_be_noised is None else np.array(may_be_noised, dtype=np.bool_)
        self.add_documents(tokens, np.array([len(tokens)]), num_text_bytes, flags)

    def add_documents(
        self, tokens: NDArray[np.integer], lengths: NDArray[np.int64], num_text_bytes: int, may_be_noised: NDArray[np.bool_] | None = None
    ) -> None:
        """Append several documents.

        Args:
            tokens: [n], the tokens of all documents, each document's EOS included.
            lengths: the number of tokens of each document.
            num_text_bytes: the length of all texts together in UTF-8.
            may_be_noised: bool [n], True for each token that may be noised. Only a writer with ``limits_noise`` takes it.

        Raises:
            DatasetError: if a document has more tokens than the index format allows (2^31 - 1).
        """
        assert int(lengths.sum()) == len(tokens), "lengths that are not the tokens'"
        assert (may_be_noised is None) == (self._may_be_noised_file is None), "limits_noise says whether documents come with may_be_noised"
        if len(lengths) and int(lengths.max()) > np.iinfo(np.int32).max:
            number = self._num_documents + int(lengths.argmax())
            raise DatasetError(f"document {number} of {self._prefix} has {lengths.max()} tokens; the format allows 2^31 - 1")
        self._idx_file.write(lengths.astype("<i4").tobytes())
        self._num_documents += len(lengths)
        self._num_tokens += len(tokens)
        self._num_text_bytes += num_text_bytes
        self._buffer.append(tokens.astype(self._dtype, copy=False))
        self._num_buffered += len(tokens)
        if self._may_be_noised_file is not None and may_be_noised is not None:
            assert may_be_noised.dtype == np.bool_, may_be_noised.dtype
            assert may_be_noised.shape == tokens.shape, "a value for each token"
            self._may_be_noised_hash.update(may_be_noised.tobytes())
            self._may_be_noised_file.write(may_be_noised.tobytes())
        if self._num_buffered >= _FLUSH_TOKENS:
            self._flush()

    def progress(self) -> WriterProgress:
        """Bring everything to the disk, where a kill or a power cut cannot undo it, and return how much it is."""
        self._flush()
        for file in self._files():
            sync_file(file)
        return WriterProgress(self._num_documents, self._num_tokens, self._num_text_bytes)

    def finalize(self, corpus: dict[str, Any] | None = None) -> DatasetManifest:
        """Give the dataset its name: bring the files to the disk, rename them, and write the manifest last.

        Raises:
            DatasetError: if no document was added.
            OSError: if the disk is full or fails; the dataset's name then has no files.
        """
        manifest = dataclasses.replace(self.seal(), corpus=corpus or {})
        publish(self._prefix, manifest)
        self.keep()
        return manifest

    def seal(self) -> DatasetManifest:
        """Complete the files under their partial names; :func:`publish` gives them the dataset's name.

        Raises:
            DatasetError: if no document was added.
        """
        if not self._num_documents:
            raise DatasetError(f"dataset {self._prefix} would be empty")
        self._flush()
        finish_index(self._idx_file, self._dtype, self._num_documents)
        self.progress()
        return self._manifest()

    def keep(self) -> None:
        """Close the files and keep them, because they are published or a later writer continues them."""
        for file in self._files():
            file.close()
        self._bin_file = None

    def discard(self) -> None:
        """Close and remove the files, unless the writer has ended already."""
        if self._bin_file is None:
            return
        for path in partial_paths(self._prefix):
            path.unlink(missing_ok=True)
        self.keep()

    def _files(self) -> list[BinaryIO]:
        """Return the files that are open."""
        return [file for file in (self._bin_file, self._idx_file, self._may_be_noised_file) if file is not None and not file.closed]

    def _go_on_from(self, resume: WriterProgress) -> None:
        """Cut the files to the recorded lengths, and hash and count their content again: the state of a hash cannot be recorded."""
        assert self._bin_file is not None
        num_bytes = {self._bin_file: resume.num_tokens * self._dtype.itemsize, self._idx_file: lengths_end(resume.num_documents)}
        if self._may_be_noised_file is not None:
            num_bytes[self._may_be_noised_file] = resume.num_tokens
        for file, wanted in num_bytes.items():
            if (found := os.fstat(file.fileno()).st_size) < wanted:
                self.keep()
                raise ResumeError(f"{file.name} has {found} bytes, its progress record says {wanted}")
            file.truncate(wanted)
            file.seek(0, os.SEEK_END)
        with open(self._bin_partial, "rb") as file, errors_named(self._bin_partial):
            while content := file.read(_READ_BYTES):
                self._bin_hash.update(content)
                self._count(np.frombuffer(content, dtype=self._dtype.newbyteorder("<")))
        if self._may_be_noised_file is not None:
            with open(self._may_be_noised_partial, "rb") as file, errors_named(self._may_be_noised_partial):
                while content := file.read(_READ_BYTES):
                    self._may_be_noised_hash.update(content)
        self._num_documents, self._num_tokens, self._num_text_bytes = resume.num_documents, resume.num_tokens, resume.num_text_bytes

    def _flush(self) -> None:
        if not self._buffer:
            return
        assert self._bin_file is not None
        tokens = np.concatenate(self._buffer)
        self._count(tokens)
        content = tokens.astype(self._dtype.newbyteorder("<"), copy=False).tobytes()
        self._bin_hash.update(content)
        self._bin_file.write(content)
        self._buffer, self._num_buffered = [], 0

    def _count(self, tokens: NDArray[np.integer]) -> None:
        assert tokens.max() < len(self._token_counts), "a token id outside the tokenizer's vocabulary"
        self._token_counts += np.bincount(tokens, minlength=len(self._token_counts))

    def _manifest(self) -> DatasetManifest:
        assert self._token_counts[self._tokenizer.mask_token_id] == 0, "a document holds the mask token"
        with open(self._idx_partial, "rb") as idx_file, errors_named(self._idx_partial):
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
            may_be_noised_num_bytes=0 if self._may_be_noised_file is None else self._may_be_noised_partial.stat().st_size,
            may_be_noised_sha256="" if self._may_be_noised_file is None else self._may_be_noised_hash.hexdigest(),
            versions={"tokenizers": tokenizers.__version__},
        )

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.discard()


def partial_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """Return the names of PREFIX.bin, PREFIX.idx and PREFIX.may_be_noised while they are written."""
    return _partial(bin_path(prefix)), _partial(idx_path(prefix)), _partial(may_be_noised_path(prefix))


def _partial(path: Path) -> Path:
    return Path(f"{path}{PARTIAL_SUFFIX}")


def _open_partial(path: Path, resume: WriterProgress | None) -> BinaryIO:
    """Open a file for writing: a new file, or the file that an interrupted writer left."""
    if resume is None:
        return open_new(path)
    try:
        return open_in_place(path, "r+b")
    except FileNotFoundError:
        raise ResumeError(f"{path} is gone") from None


def publish(prefix: str | Path, manifest: DatasetManifest) -> None:
    """Give sealed files the dataset's name. After a kill between two of its steps, another call completes the work.

    An older dataset of the name is removed first, its manifest before its files, so that no mixture of the two datasets ever counts as a
    dataset.

    Raises:
        ResumeError: if the files do not have the sizes in the manifest.
    """
    check_sealed(prefix, manifest)
    directory = bin_path(prefix).parent
    paths = [file.path for file in manifest.files(prefix)]
    if _partial(idx_path(prefix)).exists():  # the index is renamed last, so an index under the dataset's name belongs to an older dataset
        manifest_path(prefix).unlink(missing_ok=True)
        idx_path(prefix).unlink(missing_ok=True)
        if may_be_noised_path(prefix) not in paths:
            may_be_noised_path(prefix).unlink(missing_ok=True)
        sync_directory(directory)
    for path in paths:
        if _partial(path).exists():
            os.replace(_partial(path), path)
    sync_directory(directory)
    manifest.write(manifest_path(prefix))


def check_sealed(prefix: str | Path, manifest: DatasetManifest) -> None:
    """Require that sealed files, under their partial or final names, have the sizes in the manifest.

    Raises:
        ResumeError: if a file is missing or has another size.
    """
    for path, num_bytes, _ in manifest.files(prefix):
        there = _partial(path) if _partial(path).exists() else path
        if not there.exists() or there.stat().st_size != num_bytes:
            raise ResumeError(f"{there} is not the file of {num_bytes} bytes that was written")


def unigram_bits(token_counts: NDArray[np.int64]) -> float:
    """Return the bits of a text under the order-0 model of its own token frequencies; ``token_counts`` is int64 [vocab_size]."""
    counts = token_counts[token_counts > 0].astype(np.float64)
    return float(math.fsum(counts * -np.log2(counts / counts.sum())))


def open_exclusively(path: Path) -> BinaryIO:
    """Open a file for appending, with a lock that only one process can hold.

    The lock ends with the process, however it ends. With the lock held, the name is looked up again: another writer may have finished and
    renamed the file in between, and emptying the file then would destroy that writer's dataset. Where the file system has no locks, a
    warning says that nothing stops a second writer.

    Raises:
        DatasetError: if another process has opened the file through this function.
        OSError: as :func:`open_in_place`.
    """
    file = open_in_place(path, "ab")
    try:
        refusal = lock_file(file, wait=False)
        if not path.exists() or os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
            raise BlockingIOError
    except BlockingIOError:
        file.close()
        raise DatasetError(f"another process is writing {path}") from None
    if refusal is not None:
        logger.warning("%s: its file system has no locks, so that a second process with this output would damage it", refusal)
    return file
