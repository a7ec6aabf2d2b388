"""A corpus: some files, and the rules by which they are documents."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.files import CorpusError, Kind, find_files
from data_tools.text import SKIP_HINT, Counts, Document, Rules, UnitReader, UnitText
from data_tools.units import FileUnits

logger = logging.getLogger(__name__)

_MAX_LOGGED = 20
_DEFAULT_RULES = Rules()


class TextCorpus(FileUnits):
    """The documents of some files, in a fixed order: the paths as given, a directory's files sorted by path.

    What a file holds is told by its name: records a line (.jsonl, .ndjson), rows (.parquet, .arrow), otherwise one document;
    .gz, .zst and .zstd are decompressed. Hidden files and directories (a leading dot) inside a directory are left out. Text is
    UTF-8; a byte order mark at the start of a file is dropped. Documents of white space alone are left out and counted.
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
            extensions: endings of the files taken from directories, such as ".txt"; none = all files.
            kind: what all files hold, whatever their names.

        Raises:
            CorpusError: if a path is missing, there is no file, a link leads nowhere (unless skipped), a rule is no regular expression,
                or text files are to be filtered by a field.
        """
        self.rules = rules
        self.reader = UnitReader(rules)
        self.files: list[str] = [file for path in paths for file in find_files(Path(path), extensions)]
        if not self.files:
            wanted = f" ending in {', '.join(extensions)}" if extensions else ""
            raise CorpusError(f"the corpus is empty: no files{wanted} under {', '.join(map(str, paths))}")
        fields = [rules.text_field, *(name for name, _ in rules.filters)]
        super().__init__(self.files, fields, kind, limits=rules.limits, passes_over=rules.on_error == "skip")
        if self.broken and rules.on_error == "fail":  # now, not when all that comes before it has been read
            raise CorpusError(f"{next(iter(self.broken.values()))} {SKIP_HINT}")
        whole = [file for file in self.files if file not in self.broken]
        self.kinds = Counter(map(self.kind_of, whole))
        if rules.filters and self.kinds["text"]:
            first = next(file for file in whole if self.kind_of(file) == "text")
            raise CorpusError(f"{first} is a text file, which has no fields to filter by; --extensions or --format say what to read")
        self.log = LeftOut()

    def __iter__(self) -> Iterator[Document]:
        return self.documents(lambda num_bytes_done, num_bytes_decoded: None)

    def documents(self, show_progress: Callable[[int, int], None]) -> Iterator[Document]:
        """The documents; counts start anew with each pass.

        ``show_progress`` is called again and again, even where there is no document for a long time, with the bytes of the files that are
        done and the bytes decoded since the call before.

        Raises:
            CorpusError: for input that is not text or is over a limit (unless skipped), naming file, line and byte; or if no document was
                found.
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

    def summary(self) -> str:
        """What there is to read, for the log."""
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(self.kinds.items()))
        return f"{self.kinds.total()} files ({kinds}), {self.num_bytes / 1e6:.1f} MB"

    def facts(self, options: dict[str, Any], counts: Counts) -> dict[str, Any]:
        """For a manifest: what was read, how, and what was left out."""
        return {
            "num_files": len(self.files),
            "num_bytes": self.num_bytes,
            "files_sha256": self.fingerprint(),
            "options": options,
            **dataclasses.asdict(counts),
        }

    def fingerprint(self) -> str:
        """sha256 of the files' names and sizes, in order."""
        listing = hashlib.sha256()
        for name, start in zip(self.files, self._starts[1:], strict=True):
            listing.update(f"{name}\0{start}\n".encode("utf-8", "surrogateescape"))
        return listing.hexdigest()


class LeftOut:
    """Counts of a corpus, and what the log says about what is no document."""

    def __init__(self, counts: Counts | None = None) -> None:
        self.counts = counts or Counts()
        self._num_faults = 0

    def add(self, text: UnitText) -> None:
        """Count a unit and log its bad records, the first of the corpus in full.

        Raises:
            CorpusError: if the unit was not read to its end.
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
            logger.warning("... and so %d more times", self._num_faults - _MAX_LOGGED)
        if counts.num_bad or counts.num_empty:
            logger.info("left out %d files or lines that are not text and %d empty documents", counts.num_bad, counts.num_empty)
        if counts.num_too_large:
            logger.info("left out %d files, lines or rows over --max-document-size or --max-row-group-size", counts.num_too_large)
        if counts.num_filtered:
            logger.info("left out %d records or documents by filters and length", counts.num_filtered)
        if counts.num_duplicates:
            logger.info("left out %d duplicates", counts.num_duplicates)
        if counts.num_documents == 0:
            raise CorpusError(
                f"the corpus is empty: no text in {num_files} files ({counts.num_empty} empty documents, {counts.num_bad} not text, "
                f"{counts.num_too_large} over a limit, {counts.num_filtered} filtered out)"
            )
