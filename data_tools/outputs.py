"""The datasets that a run of data_tools.tokenize writes, and the record of progress from which a killed run resumes.

While a run writes, its files have partial names: PREFIX.bin.partial and PREFIX.idx.partial (PREFIX_00000..., in shards) and, for
the first dataset only, PREFIX.progress.partial and PREFIX.hashes.partial. The record says how much of the files is on the disk, which
documents these are, and which run they belong to. A resumed run cuts off what was written after the record. When all documents are
written, a last record states this, and the datasets get their names; after a kill at this point the next run gives them their names again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.duplicates import HASH_BYTES
from data_tools.encode import TokenizedUnit
from data_tools.unit_reader import Counts
from data_tools.units import Position
from w1train.config.reading import read_json_object
from w1train.data.dataset_manifest import DatasetManifest, dataset_paths, manifest_path
from w1train.data.sharded_dataset import shard_notes
from w1train.data.tokenizer import Tokenizer
from w1train.data.writer import DatasetWriter, ResumeError, WriterProgress, check_sealed, open_exclusively, partial_paths, publish
from w1train.runtime.files import PARTIAL_SUFFIX, errors_named, sync_file, write_bytes
from w1train.runtime.output_files import require_writable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """The options for writing datasets."""

    shard_tokens: int | None = None
    """The number of tokens of a shard; None = one dataset without shards."""
    overwrite: bool = False
    """Replace existing datasets."""
    seconds_between_records: float = 10.0


@dataclass(slots=True)
class OutputRecord:
    """The progress of one dataset, or of its shards."""

    sealed: list[DatasetManifest] = field(default_factory=list)
    """The manifests of the complete shards, which still have partial names."""
    writer: WriterProgress | None = None
    """The progress of the next shard; None = it has not been started."""


@dataclass(slots=True)
class Record:
    """The record of a run's progress."""

    run: str
    """A hash of all that the output depends on."""
    position: Position = field(default_factory=Position)
    """The place in the corpus where the next unit starts."""
    counts: Counts = field(default_factory=Counts)
    num_hashes: int = 0
    outputs: list[OutputRecord] = field(default_factory=list)
    is_complete: bool = False
    """This flag tells whether all documents are written, and only the names of the datasets are missing."""

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """Read a record; return None if the file does not exist, or if this version did not write it."""
        try:
            content = read_json_object(path, "record of progress")
            outputs = [
                OutputRecord(
                    [DatasetManifest(**shard) for shard in output["sealed"]], output["writer"] and WriterProgress(**output["writer"])
                )
                for output in content.pop("outputs")
            ]
            position, counts = Position(**content.pop("position")), Counts(**content.pop("counts"))
            return cls(position=position, counts=counts, outputs=outputs, **content)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning(
                "%s is not a record of this version of w1train data tokenize (%s): the run starts from the beginning", path, error
            )
            return None


class Output:
    """One dataset, or the shards PREFIX_00000 and so on. A shard ends with the document that brings it to ``shard_tokens`` tokens."""

    def __init__(self, prefix: str, tokenizer: Tokenizer, shard_tokens: int | None, overwrite: bool, record: OutputRecord) -> None:
        self._prefix = prefix
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._overwrite = overwrite
        self.sealed = list(record.sealed)
        """The manifests of the complete shards, or of the dataset when it is complete."""
        for number, manifest in enumerate(self.sealed):
            check_sealed(self.name(number), manifest)
        self._writer = self._open(record.writer)

    def _open(self, resume: WriterProgress | None) -> DatasetWriter:
        return DatasetWriter(self.name(len(self.sealed)), self._tokenizer, self._overwrite, resume)

    def name(self, number: int) -> str:
        """Return the prefix of a shard, or of the dataset that is not in shards."""
        return self._prefix if self._shard_tokens is None else f"{self._prefix}_{number:05d}"

    def add(self, tokens: NDArray[np.integer], lengths: NDArray[np.int64], num_bytes: NDArray[np.int64]) -> None:
        """Append documents. When a shard is full, the following documents go to the next shard."""
        while self._shard_tokens is not None and len(lengths):
            ends = np.cumsum(lengths)
            count = int(np.searchsorted(ends, self._shard_tokens - self._writer.num_tokens)) + 1
            if count > len(lengths):
                break
            self._writer.add_documents(tokens[: ends[count - 1]], lengths[:count], int(num_bytes[:count].sum()))
            self._seal_shard()
            self._writer = self._open(None)
            tokens, lengths, num_bytes = tokens[ends[count - 1] :], lengths[count:], num_bytes[count:]
        if len(lengths):
            self._writer.add_documents(tokens, lengths, int(num_bytes.sum()))

    def seal(self) -> None:
        """Complete the files after the last document. A last shard without documents is removed.

        Raises:
            DatasetError: if the dataset has no document.
        """
        if self.sealed and not self._writer.num_documents:
            self._writer.discard()
        else:
            self._seal_shard()

    def _seal_shard(self) -> None:
        self.sealed.append(self._writer.seal())
        self._writer.keep()

    def record(self) -> OutputRecord:
        """Bring all that was written to the disk, and return the record of it."""
        return OutputRecord(self.sealed, self._writer.progress())

    def keep(self) -> None:
        """Close the files and keep them, for a later run to resume."""
        self._writer.keep()

    def discard(self) -> None:
        """Close and remove the files."""
        self._writer.discard()
        for number in range(len(self.sealed)):
            for path in partial_paths(self.name(number)):
                path.unlink(missing_ok=True)


def output_paths(prefix: str, in_shards: bool) -> list[Path]:
    """Return the files that a dataset may have. Of shards, whose number is not known, these are the files of all numbers that occur."""
    if not in_shards:
        return dataset_paths(prefix)
    folder = Path(prefix).parent
    # On a file system that ignores case, the shards that exist may have another spelling.
    pattern = re.compile(rf"{re.escape(Path(prefix).name)}_([0-9]{{5,}})\..*", re.IGNORECASE)
    matches = map(pattern.fullmatch, os.listdir(folder) if folder.is_dir() else ())
    numbers = sorted({int(match[1]) for match in matches if match})
    return [path for number in numbers for path in dataset_paths(f"{prefix}_{number:05d}")]


def progress_paths(prefix: str) -> tuple[Path, Path]:
    """Return the paths of the record of progress and of the hashes of documents, which a run keeps beside its first dataset."""
    return Path(f"{prefix}.progress{PARTIAL_SUFFIX}"), Path(f"{prefix}.hashes{PARTIAL_SUFFIX}")


class Outputs:
    """The datasets of one run; use it as a context manager.

    If a mistake of the user ends the ``with`` block, the files are removed. If another error ends it (Ctrl-C, a full disk), the files that
    the record covers are kept.
    """

    def __init__(self, prefixes: Sequence[str], tokenizer: Tokenizer, run: str, options: OutputOptions) -> None:
        """Open the datasets for writing, and resume an interrupted run if there is a record of it.

        Args:
            run: a hash of all that the datasets depend on; a record with another hash is not resumed.

        Raises:
            OutputError: if a file of a dataset exists and may not be overwritten.
            DatasetError: if another process is writing a dataset.
        """
        self._prefixes, self._tokenizer, self._options = prefixes, tokenizer, options
        self._record_path, hashes_path = progress_paths(prefixes[0])
        hashes_path.parent.mkdir(parents=True, exist_ok=True)
        self._hashes_path = hashes_path
        self._hashes = open_exclusively(hashes_path)
        self._last_record = time.monotonic()
        self._outputs: list[Output] = []
        try:
            self.record: Record = self._resumed(run) or self._begun(run)
        except BaseException:
            self._end_files(remove=not self._record_path.exists())
            raise

    def _resumed(self, run: str) -> Record | None:
        """Resume the interrupted run, and return its record; None if this run has no record, or the files do not match it."""
        record = Record.read(self._record_path)
        if record is not None and record.run != run:
            logger.warning("%s is of a run with other input or options: this run starts from the beginning", self._record_path)
            return None
        if record is None:
            return None
        try:
            self._check_hashes(record)
            if not record.is_complete:
                self._open_all(record.outputs)
            else:
                self._check_complete(record)
        except ResumeError as error:
            logger.warning("%s; the run starts from the beginning", error)
            return None
        logger.info("resuming an interrupted run: %d documents are done", record.counts.num_documents)
        return record

    def _begun(self, run: str) -> Record:
        paths = [path for prefix in self._prefixes for path in output_paths(prefix, self._options.shard_tokens is not None)]
        require_writable(paths, (), overwrite=self._options.overwrite)
        for output in self._outputs:
            output.keep()
        self._outputs.clear()
        self._record_path.unlink(missing_ok=True)
        self._hashes.truncate(0)
        record = Record(run, outputs=[OutputRecord() for _ in self._prefixes])
        self._open_all(record.outputs)
        return record

    def _open_all(self, records: Sequence[OutputRecord]) -> None:
        for prefix, record in zip(self._prefixes, records, strict=True):
            self._outputs.append(Output(prefix, self._tokenizer, self._options.shard_tokens, self._options.overwrite, record))

    def _check_hashes(self, record: Record) -> None:
        wanted = record.num_hashes * HASH_BYTES
        if (found := self._hashes_path.stat().st_size) < wanted:
            raise ResumeError(f"{self._hashes_path} has {found} bytes, its progress record says {wanted}")
        self._hashes.truncate(wanted)

    def _check_complete(self, record: Record) -> None:
        for name, manifest in self._sealed(record):
            check_sealed(name, manifest)

    def _sealed(self, record: Record) -> Iterator[tuple[str, DatasetManifest]]:
        for prefix, output in zip(self._prefixes, record.outputs, strict=True):
            for number, manifest in enumerate(output.sealed):
                yield prefix if self._options.shard_tokens is None else f"{prefix}_{number:05d}", manifest

    def old_hashes(self) -> bytes:
        """Return the hashes of the documents that an interrupted run had written, 16 bytes each."""
        with errors_named(self._hashes_path):
            return self._hashes_path.read_bytes()

    def add(self, unit: TokenizedUnit, is_new: NDArray[np.bool_] | None) -> None:
        """Append a unit's documents, each to its dataset, without those for which ``is_new`` [n] is False."""
        if is_new is not None:
            new_hashes = np.frombuffer(unit.hashes, dtype=f"V{HASH_BYTES}")[is_new]
            self._hashes.write(new_hashes.tobytes())
            self.record.num_hashes += len(new_hashes)
        for side, output in enumerate(self._outputs):
            chosen = unit.held_out == bool(side)
            if is_new is not None:
                chosen &= is_new
            if chosen.all():
                output.add(unit.tokens, unit.lengths, unit.num_bytes)
            elif chosen.any():
                output.add(unit.tokens[np.repeat(chosen, unit.lengths)], unit.lengths[chosen], unit.num_bytes[chosen])

    def is_record_due(self) -> bool:
        """Return whether the last record is old enough for another record."""
        return time.monotonic() - self._last_record >= self._options.seconds_between_records

    def write_record(self, position: Position, is_complete: bool = False) -> None:
        """Bring everything to the disk, and then write the record of it."""
        sync_file(self._hashes)
        self.record.outputs = [OutputRecord(o.sealed) if is_complete else o.record() for o in self._outputs]
        self.record.position, self.record.is_complete = position, is_complete
        write_bytes(self._record_path, json.dumps(asdict(self.record)).encode())
        self._last_record = time.monotonic()

    def seal(self, position: Position) -> None:
        """Complete all files after the last document, still under their partial names.

        Raises:
            DatasetError: if a dataset would be empty.
        """
        for output in self._outputs:
            output.seal()
        self.write_record(position, is_complete=True)

    def publish(self, corpus: dict[str, Any]) -> list[tuple[str, DatasetManifest]]:
        """Give the sealed datasets their names, and write their manifests, which describe the corpus.

        Returns:
            The prefix and the manifest of each dataset.
        """
        in_shards = self._options.shard_tokens is not None
        notes = [note for output in self.record.outputs for note in (shard_notes(output.sealed) if in_shards else [{}])]
        sealed = zip(self._sealed(self.record), notes, strict=True)
        published = [(name, replace(manifest, corpus=corpus, shard=note)) for (name, manifest), note in sealed]
        for name, manifest in published:
            publish(name, manifest)
        if in_shards:
            for prefix, output in zip(self._prefixes, self.record.outputs, strict=True):
                _remove_old_shards(prefix, len(output.sealed))
        self._record_path.unlink()
        self._end_files(remove=True)
        return published

    def _end_files(self, remove: bool) -> None:
        if remove:
            self._hashes_path.unlink(missing_ok=True)
        self._hashes.close()

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._hashes.closed:
            return
        remove = isinstance(error, ValueError) or not self._record_path.exists()
        for output in self._outputs:
            if remove:
                output.discard()
            else:
                output.keep()
        if remove:
            self._record_path.unlink(missing_ok=True)
        else:
            logger.info("the same command resumes from the last record")
        self._end_files(remove)


def _remove_old_shards(prefix: str, first: int) -> None:
    """Remove the shards from number ``first`` on, which a replaced dataset had in addition to those of the new dataset."""
    number = first
    while manifest_path(name := f"{prefix}_{number:05d}").exists():
        logger.info("removing %s, a shard of the dataset that is replaced", name)
        for path in dataset_paths(name):
            path.unlink(missing_ok=True)
        number += 1
