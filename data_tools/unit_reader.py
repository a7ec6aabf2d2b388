"""The reader that makes documents of a corpus's units, and decides what is left out and why."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from decimal import Decimal
from typing import Literal

from data_tools.corpus_files import Limits, document_fault, split_text_fault
from data_tools.fields import look_up
from data_tools.table_rows import rows_of
from data_tools.units import Unit
from w1train.data.text.decompress import ContentReader, DamagedError, WindowError
from w1train.data.text.file_names import CorpusError, unsupported_compression
from w1train.data.text.json_records import BYTE_ORDER_MARK, NestingError, begins_with_record, has_lines_of_records, parse_record

BLANK_LINES = "blank-lines"
SKIP_HINT = "(--on-error skip leaves such input out)"
_MAX_MESSAGES = 20


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a corpus."""

    text: str
    origin: str
    """FILE, or FILE:LINE in JSONL, or FILE:ROW in a table (both count from 1), followed by #PIECE if the text was split."""
    num_bytes: int
    """Length in UTF-8."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules that make documents of a corpus."""

    text_field: str = "text"
    """The key or column that holds the text. a.b is b inside of a, unless there is a key "a.b"."""
    split_on: str | None = None
    """The rule of cuts: "blank-lines" = at blank lines, which are dropped; otherwise a regular expression (multi-line mode), at each match
    of which a new document begins."""
    filters: tuple[tuple[str, str], ...] = ()
    """(field, regular expression): a record is taken only if each field matches its expression somewhere."""
    min_bytes: int = 0
    """Shorter documents are left out (UTF-8, after splitting)."""
    max_bytes: int | None = None
    """Longer documents are left out; None = no limit."""
    on_error: Literal["fail", "skip"] = "fail"
    """The answer to input that is not text or is over a limit: stop, or leave it out, counted and logged."""
    limits: Limits = field(default_factory=Limits)
    """The limits on a document and a row group."""
    is_text_stated: bool = False
    """Tell whether the user has stated that all files are text, also those that look like JSON."""

    @property
    def file_limit(self) -> int:
        """Return the most bytes of a text file. A file that is split is in memory as a whole, while its pieces, the documents, are
        processed one by one."""
        return self.limits.document if self.split_on is None else self.limits.row_group


@dataclass(slots=True)
class Counts:
    """The counts of a corpus or of a part of it."""

    num_documents: int = 0
    num_empty: int = 0
    """Documents that were left out because they consist of white space."""
    num_bad: int = 0
    """Files, lines and rows that were left out because they are not text."""
    num_too_large: int = 0
    """Files, lines and rows that were left out because they are over a limit; every row of a row group over its limit counts."""
    num_filtered: int = 0
    """Records and documents that were left out by a filter or a bound on the length."""
    num_duplicates: int = 0
    """Documents that were left out because their text had occurred before."""

    def add(self, other: Counts) -> None:
        """Add the counts of another part."""
        for name in (counter.name for counter in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class UnitText:
    """The documents of a unit, and the counts and messages about what was left out."""

    documents: list[Document] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    messages: list[str] = field(default_factory=list)
    """Messages about the first faults for which input was left out. A row group has one message."""
    num_faults: int = 0
    """The number of faults, also of those without a message."""
    num_bytes_decoded: int = 0
    """The number of decompressed bytes in the unit's part of the files, for the progress."""
    error: str | None = None
    """The message about the first bad record, at which reading stopped; only with ``on_error`` "fail"."""

    def leave_out(self, message: str, num_too_large: int = 0, num_bad: int = 1) -> None:
        """Count ``num_too_large`` records over a limit, or else ``num_bad`` bad records."""
        self.counts.num_too_large += num_too_large
        self.counts.num_bad += 0 if num_too_large else num_bad
        self.num_faults += 1
        if len(self.messages) < _MAX_MESSAGES:
            self.messages.append(message)


class _BadRecordError(Exception):
    """The exception that ends the reading of a unit."""


class UnitReader:
    """A reader of the documents in units. Each process has its own reader."""

    def __init__(self, rules: Rules) -> None:
        """Raises:
        CorpusError: if ``split_on`` or a filter is not a regular expression.
        """
        self._rules = rules
        self._split_text = splitter(rules.split_on)
        self._filters = [(name, _compile(pattern, f"cannot filter {name} by")) for name, pattern in rules.filters]

    def read(self, unit: Unit) -> UnitText:
        """Return the documents of a unit, in order.

        Raises:
            OSError: if a file cannot be opened or read.
        """
        result = UnitText(num_bytes_decoded=len(unit.content) + unit.num_bytes_passed)
        try:
            if unit.fault:
                self._reject(result, unit.fault, unit.num_too_large, unit.num_bad)
            elif unit.kind == "text":
                for path in unit.paths:
                    self._read_text(result, path)
            elif unit.kind == "jsonl":
                self._read_lines(result, unit)
            else:
                self._read_rows(result, unit)
        except _BadRecordError as error:
            result.error = str(error)
        return result

    def _read_text(self, result: UnitText, path: str) -> None:
        try:
            if fault := unsupported_compression(path):
                raise CorpusError(fault)
            content, num_bytes = self._content(path)
            result.num_bytes_decoded += len(content)
            if num_bytes is None or num_bytes > self._rules.file_limit:
                self._reject(result, f"{path}: {self._file_fault(num_bytes)}", 1)
            else:
                self._add(result, self._text_of(content), path)
        except (CorpusError, DamagedError) as error:
            self._reject(result, f"{path}: {error}")
        except WindowError as error:
            self._reject(result, f"{path}: {error}", 1)

    def _text_of(self, content: bytes) -> str:
        """Decode a text file.

        Raises:
            CorpusError: if it is not UTF-8, or is JSON under a name without .json or .jsonl.
        """
        text = decode(content)
        if self._rules.is_text_stated:
            return text
        if begins_with_record(text):
            raise CorpusError("it begins with a JSON object: give --format json or jsonl, or --format text to take it as plain text")
        if has_lines_of_records(text):
            raise CorpusError("its lines from the second on are JSON objects: give --format jsonl, or --format text for plain text")
        return text

    def _file_fault(self, num_bytes: int | None) -> str:
        fault = document_fault if self._rules.split_on is None else split_text_fault
        return fault(num_bytes, self._rules.file_limit)

    def _content(self, path: str) -> tuple[bytes, int | None]:
        """Return the content of a file, and its length without a byte order mark.

        Reading stops when the file exceeds the limit. The length is then None if the file is compressed.
        """
        most = self._rules.file_limit + len(codecs.BOM_UTF8)
        content = bytearray()
        with ContentReader(path, self._rules.limits.row_group) as stream:
            for chunk in stream.chunks():
                content += chunk
                if len(content) > most:
                    return bytes(content), stream.num_bytes
        return bytes(content), len(content) - len(codecs.BOM_UTF8) * content.startswith(codecs.BOM_UTF8)

    def _read_lines(self, result: UnitText, unit: Unit) -> None:
        offset = unit.start.offset
        for number, line in enumerate(split_lines(unit.content), unit.start.record + 1):
            origin = f"{unit.paths[0]}:{number}"
            num_bytes = len(line) - line.endswith(b"\n")
            try:
                if num_bytes > self._rules.limits.document:
                    self._reject(result, f"{origin}: {document_fault(num_bytes, self._rules.limits.document)}", 1)
                    continue
                content = decode(line, offset)
                if content.strip():
                    self.add_record(result, _parse(content), origin, "JSON object")
                else:
                    result.counts.num_empty += 1
            except CorpusError as error:
                self._reject(result, f"{origin}: {error}")
            finally:
                offset += len(line)

    def _read_rows(self, result: UnitText, unit: Unit) -> None:
        for number, row in enumerate(rows_of(unit.content), unit.start.record + 1):
            origin = f"{unit.paths[0]}:{number}"
            try:
                if isinstance(row, str):
                    raise CorpusError(row)
                self.add_record(result, row, origin, "record")
            except CorpusError as error:
                self._reject(result, f"{origin}: {error}")

    def add_record(self, result: UnitText, record: object, origin: str, kind: str) -> None:
        """Add the documents of a record.

        Raises:
            CorpusError: if the record is bad.
        """
        name = self._rules.text_field
        try:
            value = look_up(record, name)
        except CorpusError as error:
            raise CorpusError(f"no {kind} with a string {name!r}: {error}") from error
        # The start of a row is treated alike in all formats: one byte order mark is dropped, as at the start of a text file.
        text = decode(value) if isinstance(value, bytes) else value.removeprefix(BYTE_ORDER_MARK) if isinstance(value, str) else None
        if text is None:
            found = "" if value is None else f" (it is {type(value).__name__})"
            raise CorpusError(f"no {kind} with a string {name!r}{found}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # "\ud800" is valid JSON, but not a character
            raise CorpusError(f"character {error.start} of {name!r} is a lone surrogate") from error
        if self._passes(record, kind):
            self._add(result, text, origin)
        else:
            result.counts.num_filtered += 1

    def _passes(self, record: object, kind: str) -> bool:
        values = []
        for name, _ in self._filters:
            try:
                values.append(_as_text(look_up(record, name)))
            except CorpusError as error:
                raise CorpusError(f"no {kind} with a field {name!r} to filter by: {error}") from error
        return all(pattern.search(value) for value, (_, pattern) in zip(values, self._filters, strict=True))

    def _add(self, result: UnitText, text: str, origin: str) -> None:
        """Add a document or its pieces, and count those that are left out because they are empty, too short or too long."""
        texts = self._split_text(text)
        for i, piece in enumerate(texts):
            num_bytes = len(piece.encode("utf-8"))
            if not piece.strip():
                result.counts.num_empty += 1
            elif num_bytes < self._rules.min_bytes or (self._rules.max_bytes is not None and num_bytes > self._rules.max_bytes):
                result.counts.num_filtered += 1
            elif num_bytes > self._rules.limits.document:
                self._reject(result, f"{origin}#{i}: {document_fault(num_bytes, self._rules.limits.document)}", 1)
            else:
                result.counts.num_documents += 1
                result.documents.append(Document(piece, f"{origin}#{i}" if len(texts) > 1 else origin, num_bytes))

    def _reject(self, result: UnitText, message: str, num_too_large: int = 0, num_bad: int = 1) -> None:
        """Count input that is left out: ``num_too_large`` records over a limit, or else ``num_bad`` bad records."""
        if self._rules.on_error == "fail":
            raise _BadRecordError(f"{message} {SKIP_HINT}")
        result.leave_out(message, num_too_large, num_bad)


def _as_text(value: object) -> str:
    """Return a field's value as the text that filters match: a missing value as empty text, a value other than text as JSON."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Decimal):  # an integer of thousands of digits
        return str(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _parse(line: str) -> object:
    try:
        return parse_record(line)
    except NestingError as error:
        raise CorpusError(str(error)) from error
    except ValueError as error:
        raise CorpusError(f"not JSON: {error}") from error


def splitter(split_on: str | None) -> Callable[[str], list[str]]:
    """Return a function that cuts a text into documents.

    Raises:
        CorpusError: if ``split_on`` is neither "blank-lines" nor a regular expression.
    """
    if split_on is None:
        return lambda text: [text]
    if split_on == BLANK_LINES:
        return re.compile(r"\n[^\S\n]*\n\s*").split
    pattern = _compile(split_on, "cannot split on", f"neither {BLANK_LINES} nor")

    def split_before(text: str) -> list[str]:
        starts = [0, *(match.start() for match in pattern.finditer(text) if match.start() > 0), len(text)]
        return [text[start:stop] for start, stop in itertools.pairwise(starts)]

    return split_before


def _compile(pattern: str, purpose: str, fault: str = "not") -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise CorpusError(f"{purpose} {pattern!r}: it is {fault} a regular expression ({error})") from error


def decode(content: bytes, offset: int = 0) -> str:
    """Decode UTF-8. A byte order mark at the start is dropped: of a file, of a line (files with marks may have been joined) and of a cell.

    Args:
        offset: where the bytes begin in their file.

    Raises:
        CorpusError: if a byte is not UTF-8; the message names its place.
    """
    if content.startswith(codecs.BOM_UTF8):
        content, offset = content[len(codecs.BOM_UTF8) :], offset + len(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"byte {offset + error.start} (0x{content[error.start]:02x}) is not UTF-8: {error.reason}") from error


def split_lines(content: bytes) -> Iterator[bytes]:
    """Yield lines with their line feeds. bytes.splitlines would also split at carriage returns, which may occur in JSONL."""
    start = 0
    while start < len(content):
        stop = content.find(b"\n", start) + 1 or len(content)
        yield content[start:stop]
        start = stop
