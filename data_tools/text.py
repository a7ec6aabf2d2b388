"""Documents from files, directory trees and JSONL."""

from __future__ import annotations

import codecs
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Literal

logger = logging.getLogger(__name__)

JSONL_SUFFIXES = {".jsonl", ".ndjson"}
BLANK_LINES = "blank-lines"
_MAX_LOGGED = 20


class CorpusError(ValueError):
    """A corpus that is missing, empty or not text."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a corpus."""

    text: str
    origin: str
    """FILE, FILE:LINE in JSONL, with #PIECE after it if the text was split."""
    num_bytes: int
    """Length in UTF-8."""


class TextCorpus:
    """The documents of some files, in a fixed order: the paths as given, a directory's files sorted by path.

    A file is one document, unless its name ends in .jsonl or .ndjson: then each line is a JSON object with the document in
    ``text_field``. Hidden files and directories (a leading dot) inside a directory are left out. Text is UTF-8; a byte order
    mark at the start of a file is dropped. Documents of white space alone are left out and counted.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        extensions: Sequence[str] = (),
        text_field: str = "text",
        split_on: str | None = None,
        on_error: Literal["fail", "skip"] = "fail",
    ) -> None:
        """
        Args:
            extensions: endings of the files taken from directories, such as ".txt"; none = all files.
            split_on: "blank-lines" = texts are cut at blank lines, which are dropped; otherwise a regular expression (multi-line
                mode): a new document begins at each match.
            on_error: what to do with a file or line that is not text: raise, or leave it out, counted and logged.

        Raises:
            CorpusError: if a path is missing, there is no file, or ``split_on`` is no regular expression.
        """
        self._text_field = text_field
        self._split_text = _splitter(split_on)
        self._on_error = on_error
        self.files: list[Path] = [file for path in paths for file in _find_files(Path(path), tuple(extensions))]
        if not self.files:
            wanted = f" ending in {', '.join(extensions)}" if extensions else ""
            raise CorpusError(f"the corpus is empty: no files{wanted} under {', '.join(map(str, paths))}")
        self.num_bytes: int = sum(file.stat().st_size for file in self.files)
        self._reset_counts()

    def _reset_counts(self) -> None:
        self.num_bytes_read: int = 0
        """Bytes of the files read so far, for progress."""
        self.num_documents: int = 0
        self.num_empty: int = 0
        """Documents without text, left out."""
        self.num_bad: int = 0
        """Files and lines that are not text, left out."""

    def __iter__(self) -> Iterator[Document]:
        """The documents; counts start anew with each pass.

        Raises:
            CorpusError: for input that is not text (unless skipped), naming file, line and byte; or if no document was found.
        """
        self._reset_counts()
        for file in self.files:
            documents = self._read_jsonl(file) if file.suffix in JSONL_SUFFIXES else self._read_text(file)
            for document in documents:
                yield from self._split(document)
        self._log_counts()
        if self.num_documents == 0:
            raise CorpusError(
                f"the corpus is empty: no text in {len(self.files)} files ({self.num_empty} empty documents, {self.num_bad} not text)"
            )

    def _read_text(self, file: Path) -> Iterator[Document]:
        content = file.read_bytes()
        self.num_bytes_read += len(content)
        try:
            text = _decode(content)
        except CorpusError as error:
            self._reject(f"{file}: {error}")
        else:
            yield Document(text, str(file), _num_bytes(text))

    def _read_jsonl(self, file: Path) -> Iterator[Document]:
        offset = 0
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                self.num_bytes_read += len(line)
                try:
                    text = self._parse_line(line, offset)
                except CorpusError as error:
                    self._reject(f"{file}:{number}: {error}")
                else:
                    yield Document(text, f"{file}:{number}", _num_bytes(text))
                offset += len(line)

    def _parse_line(self, line: bytes, offset: int) -> str:
        """The text of one JSONL line that starts at byte ``offset`` of its file; a blank line has none."""
        content = _decode(line, offset)
        if not content.strip():
            return ""
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"not JSON: {error}") from error
        text = record.get(self._text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise CorpusError(f"no JSON object with a string {self._text_field!r}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # "\ud800" is JSON, but no character
            raise CorpusError(f"character {error.start} of {self._text_field!r} is a lone surrogate") from error
        return text

    def _split(self, document: Document) -> Iterator[Document]:
        """Pieces of a document, the empty ones left out."""
        texts = self._split_text(document.text)
        pieces = [Document(text, f"{document.origin}#{i}", _num_bytes(text)) for i, text in enumerate(texts)]
        for piece in pieces if len(pieces) > 1 else [document]:
            if piece.text.strip():
                self.num_documents += 1
                yield piece
            else:
                self.num_empty += 1

    def _reject(self, message: str) -> None:
        if self._on_error == "fail":
            raise CorpusError(f"{message} (--on-error skip leaves such input out)")
        self.num_bad += 1
        if self.num_bad <= _MAX_LOGGED:
            logger.warning("left out: %s", message)

    def _log_counts(self) -> None:
        if self.num_bad > _MAX_LOGGED:
            logger.warning("... and %d more files or lines that are not text", self.num_bad - _MAX_LOGGED)
        if self.num_bad or self.num_empty:
            logger.info("left out %d files or lines that are not text and %d empty documents", self.num_bad, self.num_empty)


def _splitter(split_on: str | None) -> Callable[[str], list[str]]:
    if split_on is None:
        return lambda text: [text]
    if split_on == BLANK_LINES:
        return re.compile(r"\n[^\S\n]*\n\s*").split
    try:
        pattern = re.compile(split_on, re.MULTILINE)
    except re.error as error:
        raise CorpusError(f"cannot split on {split_on!r}: it is neither {BLANK_LINES} nor a regular expression ({error})") from error

    def split_before(text: str) -> list[str]:
        starts = [0, *(match.start() for match in pattern.finditer(text) if match.start() > 0), len(text)]
        return [text[start:stop] for start, stop in itertools.pairwise(starts)]

    return split_before


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8"))


def _decode(content: bytes, offset: int = 0) -> str:
    """UTF-8 to text; ``offset`` is where the bytes start in their file."""
    if offset == 0 and content.startswith(codecs.BOM_UTF8):
        content, offset = content[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"byte {offset + error.start} (0x{content[error.start]:02x}) is not UTF-8: {error.reason}") from error


def _find_files(path: Path, extensions: tuple[str, ...]) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CorpusError(f"corpus {path} does not exist" if not path.exists() else f"corpus {path} is neither a file nor a directory")
    files = []
    num_irregular = 0
    for directory, subdirectories, names in os.walk(path, onerror=_raise):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or not name.endswith(extensions or ""):
                continue
            file = Path(directory, name)
            if S_ISREG(file.stat().st_mode):  # reading a pipe would wait for ever
                files.append(file)
            else:
                num_irregular += 1
    if num_irregular:
        logger.warning("left out %d entries of %s that are no regular files", num_irregular, path)
    return sorted(files)


def _raise(error: OSError) -> None:
    """A directory that cannot be listed is an error (os.walk would pass over it)."""
    raise error
