"""A corpus: files, and the rules that make documents of them."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.corpus_files import find_files
from data_tools.unit_reader import SKIP_HINT, Counts, Document, Rules, UnitReader, UnitText
from data_tools.units import FileUnits
from w1train.data.text.file_names import CorpusError, Kind
from w1train.runtime.output_files import is_inside

logger = logging.getLogger(__name__)

_MAX_LOGGED = 20
_DEFAULT_RULES = Rules()


class TextCorpus(FileUnits):
    """The documents of files in a fixed order: the paths as given, and the files of a directory sorted by path.

    The name of a file tells what it holds: one record per line (.jsonl, .jsonlines, .ndjson), records in lines or in an array (.json), rows
    (.parquet, .arrow), or otherwise one document. Files ending in .gz, .zst, .zstd, .xz and .bz2 are decompressed. Hidden files and
    directories (with a leading dot) and files that w1train writes are left out inside of a directory. Text is UTF-8, and a byte order mark
    at the start of a file or a row is dropped. Documents that consist of white space are left out and counted.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        rules: Rules = _DEFAULT_RULES,
        *,
        extensions: Sequence[str] = (),
        kind: Kind | None = None,
    ) -> None:
        """
        Args:
            extensions: endings of the files to take from directories, such as ".txt"; an empty sequence takes all files.
            kind: what all files hold, whatever their names; None = what their names tell.

        Raises:
            CorpusError: if a path is missing, there is no file, a symbolic link is broken (unless it is left out), a rule is not a regular
                expression, or there is a filter by field for text files.
        """
        self.rules = rules = dataclasses.replace(rules, is_text_stated=kind == "text")
        self.reader = UnitReader(rules)
        self._directories, self._extensions = [Path(path) for path in paths if Path(path).is_dir()], extensions
        found = [find_files(Path(path), extensions) for path in paths]
        self.files: list[str] = [file for files, _ in found for file in files]
        self.inputs: list[str] = [*self.files, *(state for _, states in found for state in states)]
        if not self.files:
            wanted = f" ending in {', '.join(extensions)}" if extensions else ""
            raise CorpusError(f"the corpus is empty: no files{wanted} under {', '.join(map(str, paths))}")
        fields = [rules.text_field, *(name for name, _ in rules.filters)]
        super().__init__(self.files, fields, kind, limits=rules.limits, passes_over=rules.on_error == "skip")
        if self.broken and rules.on_error == "fail":  # the run fails now, not after it has read all files before the link
            raise CorpusError(f"{next(iter(self.broken.values()))} {SKIP_HINT}")
        whole = [file for file in self.files if file not in self.broken]
        self.kinds = Counter(map(self.kind_of, whole))
        if rules.filters and self.kinds["text"]:
            first = next(file for file in whole if self.kind_of(file) == "text")
            raise CorpusError(f"{first} is a text file, which has no fields to filter by; choose files with --extensions or --format")
        self.log = LeftOut()

    def __iter__(self) -> Iterator[Document]:
        return self.documents(lambda num_bytes_done, num_bytes_decoded: None)

    def documents(self, show_progress: Callable[[int, int], None]) -> Iterator[Document]:
        """Yield the documents. Each pass starts to count from zero.

        ``show_progress`` is called regularly, even while no document is found for a long time, with the number of bytes of the files that
        have been read and the number of bytes decoded since the last call.

        Raises:
            CorpusError: if input is not text or is over a limit (unless it is left out), where the message names the file, line and byte;
                or if the corpus has no document.
        """
        self.log = LeftOut()
        self.num_bytes_read = 0
        for unit in self.units():
            text = self.reader.read(unit)
            self.log.add(text)
            yield from text.documents
            self.num_bytes_read = unit.num_bytes_done
            show_progress(unit.num_bytes_done, text.num_bytes_decoded)
        self.log.finish(len(self.files))

    def reads_later(self, path: Path) -> Path | None:
        """Return the directory of the corpus, if any, of which the next command would read a new file of this name."""
        if not path.name.lower().endswith(tuple(extension.lower() for extension in self._extensions) or "") or path.name.startswith("."):
            return None
        return next((directory for directory in self._directories if is_inside(path, directory)), None)

    def summary(self) -> str:
        """Describe the files to read, for the log."""
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(self.kinds.items()))
        return f"{self.kinds.total()} files ({kinds}), {self.num_bytes / 1e6:.1f} MB"

    def facts(self, options: dict[str, Any], counts: Counts) -> dict[str, Any]:
        """Return what a manifest records about the corpus: what was read, with which options, and how much was left out."""
        return {
            "num_files": len(self.files),
            "num_bytes": self.num_bytes,
            "files_sha256": self.fingerprint(),
            "options": options,
            **dataclasses.asdict(counts),
        }

    def fingerprint(self) -> str:
        """Return the SHA-256 of the files' names and sizes, in order."""
        listing = hashlib.sha256()
        for name, start in zip(self.files, self._starts[1:], strict=True):
            listing.update(f"{name}\0{start}\n".encode("utf-8", "surrogateescape"))
        return listing.hexdigest()


class LeftOut:
    """The counts of a corpus, and the log messages about the input that is left out."""

    def __init__(self, counts: Counts | None = None, wanted: str = "text") -> None:
        """
        Args:
            wanted: what the corpus should consist of.
        """
        self.counts = counts or Counts()
        self._wanted = wanted
        self._num_faults = 0

    def add(self, text: UnitText) -> None:
        """Count a unit, and log its bad records, with their messages for the first of the corpus.

        Raises:
            CorpusError: if the unit was not read to its end because of an error.
        """
        for number, message in enumerate(text.messages, self._num_faults + 1):
            if number <= _MAX_LOGGED:
                logger.warning("left out: %s", message)
        self._num_faults += text.num_faults
        self.counts.add(text.counts)
        if text.error is not None:
            raise CorpusError(text.error)

    def finish(self, num_files: int) -> None:
        """Log the counts.

        Raises:
            CorpusError: if there was no document.
        """
        counts = self.counts
        if self._num_faults > _MAX_LOGGED:
            logger.warning("... and %d more were left out", self._num_faults - _MAX_LOGGED)
        if counts.num_bad or counts.num_empty:
            what = f"files or lines that are not {self._wanted}"
            logger.info("left out %d %s and %d empty documents", counts.num_bad, what, counts.num_empty)
        if counts.num_too_large:
            logger.info("left out %d files, lines or rows over --max-document-size or --max-row-group-size", counts.num_too_large)
        if counts.num_filtered:
            logger.info("left out %d records or documents by filters and length", counts.num_filtered)
        if counts.num_duplicates:
            logger.info("left out %d duplicates", counts.num_duplicates)
        if counts.num_documents == 0:
            found = f"{counts.num_empty} empty documents, {counts.num_bad} not {self._wanted}, {counts.num_too_large} over a limit"
            raise CorpusError(f"the corpus is empty: no {self._wanted} in {num_files} files ({found}, {counts.num_filtered} filtered out)")
