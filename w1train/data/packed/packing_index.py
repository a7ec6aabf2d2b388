"""The file of a best-fit packing, PREFIX.best_fit_L.pack: it is small, is built once in the dataset's directory, and every rank reads it.

The file begins with a line of JSON, padded with blanks to 4,040 bytes, that says which dataset and options it was made from. Then follow,
little-endian:

    32 bytes                      SHA-256 of everything after it
    int64 [3]                     num_samples, num_pieces, and the number of bytes of a document's number
    int64 [num_samples + 1]       first piece of each sample, and num_pieces
    uint32 or uint64 [num_pieces] document of each piece
    uint32 [num_pieces]           the part of its document that a piece is; part k begins at the document's token k * sequence_length

A run uses a file only if the first line has the run's dataset and options; it replaces a file of other options.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from w1train.config.reading import parse_json
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.file_reader import FileReader
from w1train.data.indexed import PACKING_SUFFIX, file_size, idx_path
from w1train.data.packed.best_fit import PackedPieces, pack_best_fit
from w1train.data.packed.packing import EndOfDocument, Fill, LongDocuments, Pieces, SampleSource
from w1train.runtime.files import errors_named, replace_file
from w1train.runtime.locks import exclusive

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_HEADER_BYTES = 4096
_COUNTS_START = _HEADER_BYTES - 24
_HASH_START = _COUNTS_START - 32
_HASH_AT_ONCE = 1 << 20
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingOptions:
    """The options that a packing depends on, in addition to the dataset."""

    sequence_length: int
    align: int = 1
    eos: EndOfDocument = "keep"
    seed: int = 0


class PackingIndex:
    """An open file of a packing. The pieces of a sample are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises:
        DatasetError: if the file does not have the length that it states.
        """
        self.path, self._file = path, FileReader(path)
        self.num_samples, self._num_pieces, item_bytes = np.frombuffer(self._read(_COUNTS_START, 24), dtype="<i8").tolist()
        if item_bytes not in (4, 8):
            raise self.damage(f"a document's number has {item_bytes} bytes")
        if self.num_samples < 1 or self._num_pieces < self.num_samples:
            raise self.damage(f"{self.num_samples} samples of {self._num_pieces} pieces")
        self._document_type = np.dtype(f"<u{item_bytes}")
        self._documents_start = _HEADER_BYTES + 8 * (self.num_samples + 1)
        self._ordinals_start = self._documents_start + item_bytes * self._num_pieces
        self.num_bytes = self._ordinals_start + 4 * self._num_pieces
        if (found := file_size(path)) != self.num_bytes:
            raise self.damage(f"{found} bytes, expected {self.num_bytes}")

    def __reduce__(self) -> tuple[type[PackingIndex], tuple[Path]]:
        """Let another process open the file again."""
        return PackingIndex, (self.path,)

    def pieces(self, sample: int) -> tuple[NDArray[np.integer], NDArray[np.uint32]]:
        """Return the document of each piece of a sample, and the part of its document that the piece is."""
        first, end = np.frombuffer(self._read(_HEADER_BYTES + 8 * sample, 16), dtype="<i8").tolist()
        if not 0 <= first < end <= self._num_pieces:
            raise self.damage(f"sample {sample} has pieces {first} to {end} of {self._num_pieces}")
        item_bytes, num = self._document_type.itemsize, end - first
        documents = np.frombuffer(self._read(self._documents_start + item_bytes * first, item_bytes * num), dtype=self._document_type)
        return documents, np.frombuffer(self._read(self._ordinals_start + 4 * first, 4 * num), dtype="<u4")

    def verify_hash(self) -> None:
        """Read the file and compare its SHA-256 with the hash that it contains. A run would train on wrong pieces without an error.

        Raises:
            DatasetError: if the hashes differ.
        """
        found = hashlib.sha256()
        for start in range(_COUNTS_START, self.num_bytes, _HASH_AT_ONCE):
            found.update(self._read(start, min(_HASH_AT_ONCE, self.num_bytes - start)))
        expected = self._read(_HASH_START, 32)
        if found.digest() != expected:
            raise self.damage(f"its sha256 is {found.hexdigest()}, it was written with {expected.hex()}")

    def damage(self, fault: str) -> DatasetError:
        """Return the error of a damaged file."""
        return DatasetError(f"{self.path} is damaged: {fault}; remove the file, and the next run builds it again")

    def _read(self, offset: int, num_bytes: int) -> bytes:
        return self._file.read(num_bytes, offset)


def packing_path(dataset: TokenDataset, options: PackingOptions, directory: str | None = None) -> Path:
    """Return the path of a packing's file, in ``directory`` or by default in the directory of the dataset."""
    prefix = Path(dataset.prefix)
    variant = "".join([f"_{options.sequence_length}", f"_align{options.align}" * (options.align > 1), "_no_eos" * (options.eos == "drop")])
    return (prefix.parent if directory is None else Path(directory)) / f"{prefix.name}.best_fit{variant}{PACKING_SUFFIX}"


def packings_of(prefix: str) -> list[Path]:
    """Return the packings in a dataset's directory that have this version's format. Packings of other versions are never used."""
    path = Path(prefix)
    packings = sorted(path.parent.glob(f"{glob.escape(path.name)}.best_fit_*{PACKING_SUFFIX}"))
    return [packing for packing in packings if _is_of_this_version(packing)]


def verify_packing_file(path: Path) -> None:
    """Compare a packing's file with the hash in it.

    Raises:
        DatasetError: if the file is missing, damaged, or has another version's format.
    """
    if not path.exists():
        raise DatasetError(f"{path} does not exist")
    if not _is_of_this_version(path):
        raise DatasetError(f"{path} is not a packing of this version of w1train; the next run that needs it builds it again")
    PackingIndex(path).verify_hash()


def ensure_packing(
    dataset: TokenDataset, options: PackingOptions, directory: str | None = None, spare_directory: Path | None = None
) -> Path:
    """Build the packing unless its file exists and was made from this dataset and these options.

    If several processes call this function, one of them builds the packing while the others wait.

    Args:
        directory: the directory of the file; None = the directory of the dataset.
        spare_directory: the directory of the file if ``directory`` is None and the directory of the dataset cannot be written to.

    Returns:
        The path of the file.

    Raises:
        DatasetError: if the dataset cannot be packed.
        OSError: if the file cannot be written; no incomplete file is left under its name.
    """
    header = _header(dataset, options)
    paths = _possible_paths(packing_path(dataset, options, directory), header, None if directory else spare_directory)
    path = _found(paths, header)
    if path is not None:
        return path
    try:
        return _ensure_at(paths[0], dataset, options, header)
    except OSError as error:
        if error.errno not in _UNWRITABLE or len(paths) == 1:
            raise
        return _ensure_at(paths[1], dataset, options, header, instead=error)


def _ensure_at(
    path: Path, dataset: TokenDataset, options: PackingOptions, header: dict[str, object], instead: OSError | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path) as writer:
        if _read_header(path) != header:
            if instead is not None:
                logger.warning(
                    "the packing of %s is written to %s, because its directory cannot be written to: %s", dataset.prefix, path, instead
                )
            _build(dataset, options, path, header, writer)
    return path


def _possible_paths(path: Path, header: dict[str, object], spare_directory: Path | None) -> list[Path]:
    """Return the paths that a packing may have, in the order in which they are tried."""
    # Datasets of several directories may have the same name.
    return [path] if spare_directory is None else [path, spare_directory / f"{str(header['idx_sha256'])[:16]}_{path.name}"]


def _found(paths: Sequence[Path], header: dict[str, object]) -> Path | None:
    return next((path for path in paths if _read_header(path) == header), None)


def open_packing(
    dataset: TokenDataset, options: PackingOptions, directory: str | None = None, spare_directory: Path | None = None
) -> PackingIndex:
    """Open the file of a packing. Accept the arguments of :func:`ensure_packing`.

    Raises:
        DatasetError: if the file is missing or damaged, or was made from another dataset or other options.
    """
    header = _header(dataset, options)
    paths = _possible_paths(packing_path(dataset, options, directory), header, None if directory else spare_directory)
    path = _found(paths, header)
    if path is None:
        arguments = f"--sequence-length {options.sequence_length} --align {options.align} --eos {options.eos} --seed {options.seed}"
        state = "is not there" if _read_header(paths[0]) is None else "belongs to another dataset or other options"
        raise DatasetError(f"{paths[0]} {state}; build it with `w1train data build-packing {dataset.prefix} {arguments}`")
    return PackingIndex(path)


class BestFitDataset(SampleSource):
    """The samples of a best-fit packing, which cuts no document unless it is longer than a sample.

    The same documents share a sample in every epoch, without seeing each other. The samples have another order in each epoch.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        options: PackingOptions,
        seed: int,
        *,
        directory: str | None = None,
        spare_directory: Path | None = None,
        shuffle: bool = True,
        long_documents: LongDocuments = "restart",
        max_position: int | None = None,
        fill: Fill | None = None,
    ) -> None:
        """Open a packing that :func:`ensure_packing` has built. Accept the arguments of ``SampleSource`` and :func:`open_packing`, and
        raise their errors."""
        self.index = open_packing(dataset, options, directory, spare_directory)
        self._options = options
        super().__init__(
            dataset,
            options.sequence_length,
            seed,
            num_samples_per_epoch=self.index.num_samples,
            shuffle=shuffle,
            long_documents=long_documents,
            max_position=max_position,
            eos=options.eos,
            fill=fill,
        )

    def _pieces(self, epoch: int, slot: int) -> Pieces:
        align = self._options.align
        documents, ordinals = self.index.pieces(slot)
        offsets = ordinals.astype(np.int64) * self.sequence_length
        if (last := int(documents.max())) >= self.dataset.num_documents:
            raise self.index.damage(f"document {last} of {self.dataset.num_documents} in sample {slot}")
        bounds = self.dataset.document_offsets.bounds(documents.tolist())
        lengths = np.minimum(bounds[:, 1] - bounds[:, 0] - self._drop_eos - offsets, self.sequence_length)
        sizes = lengths if align == 1 else -(-lengths // align) * align
        ends = np.cumsum(sizes)
        if lengths.min() < 1 or ends[-1] > self.sequence_length:
            raise self.index.damage(f"sample {slot} has pieces of {lengths.tolist()} tokens")
        return Pieces(bounds[:, 0] + offsets, lengths, offsets, ends - sizes)


def _build(dataset: TokenDataset, options: PackingOptions, path: Path, header: dict[str, object], writer: str) -> None:
    started = time.perf_counter()
    logger.info("packing %s into samples of %d tokens", dataset.prefix, options.sequence_length)
    packed = pack_best_fit(document_lengths(dataset, options.eos), options.sequence_length, options.align, options.seed)
    with replace_file(path, writer) as file:
        _write(file, header, packed, _document_type(dataset))
    logger.info(
        "%s: %d samples, %.3f %% padding, in %.1f s",
        path,
        packed.num_samples,
        100 * packed.waste(options.sequence_length),
        time.perf_counter() - started,
    )


def document_lengths(dataset: TokenDataset, eos: EndOfDocument) -> NDArray[np.int64]:
    """Return how many tokens of each document are packed, int64 [num_documents]."""
    return np.maximum(np.diff(dataset.document_offsets[:]) - (eos == "drop"), 0)


def _write(file: BinaryIO, header: dict[str, object], packed: PackedPieces, document_type: np.dtype) -> None:
    first_pieces = np.zeros(packed.num_samples + 1, dtype="<i8")
    np.cumsum(np.bincount(packed.sample_of_piece, minlength=packed.num_samples), out=first_pieces[1:])
    counts = np.array([packed.num_samples, len(packed.documents), document_type.itemsize], dtype="<i8")
    body = [array.data for array in (counts, first_pieces, packed.documents.astype(document_type), packed.ordinals.astype("<u4"))]
    digest = hashlib.sha256()
    for part in body:
        digest.update(part)
    file.write(json.dumps(header).encode().ljust(_HASH_START - 1) + b"\n" + digest.digest())
    for part in body:
        file.write(part)


def _header(dataset: TokenDataset, options: PackingOptions) -> dict[str, object]:
    """Return what the packing is made from: the options, and the hash of PREFIX.idx, which has the lengths of all documents."""
    return {"format_version": FORMAT_VERSION, "idx_sha256": _idx_sha256(dataset), **asdict(options)}


def _idx_sha256(dataset: TokenDataset) -> str:
    if dataset.manifest is not None:
        return dataset.manifest.idx_sha256
    with open(idx_path(dataset.prefix), "rb") as file, errors_named(file.name):
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_header(path: Path) -> dict[str, object] | None:
    """Return the first line of a packing's file; None if the file does not exist or is not a packing."""
    try:
        with open(path, "rb") as file, errors_named(path):
            content = file.read(_HEADER_BYTES)
        header = parse_json(content[:_HASH_START].decode()) if len(content) == _HEADER_BYTES else None
    except FileNotFoundError:
        return None
    except ValueError:
        logger.warning("%s is not a packing that w1train wrote", path)
        return None
    return header if isinstance(header, dict) else None


def _is_of_this_version(path: Path) -> bool:
    header = _read_header(path)
    return header is not None and header.get("format_version") == FORMAT_VERSION


def _document_type(dataset: TokenDataset) -> np.dtype:
    return np.dtype("<u4") if dataset.num_documents < 2**32 else np.dtype("<u8")
