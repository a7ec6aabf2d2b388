"""A corpus in units: pieces small enough for memory, each a function of the input alone.

Whoever reads them, in whatever process, gets the same documents in the same order, and can begin at any of them: that is why the
output does not depend on the number of workers, and why a killed run can go on.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import accumulate

from data_tools.files import Kind, broken_link, damage, kind_of, open_file
from data_tools.tables import TableError, read_pieces

UNIT_BYTES = 1 << 19
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a corpus."""

    file: int = 0
    """Files before it."""
    offset: int = 0
    """Bytes before it in this file, decompressed; 0 in a table."""
    record: int = 0
    """Lines or rows before it in this file."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Some text files, which the reader opens; or lines or rows of a file."""

    kind: Kind
    paths: tuple[str, ...]
    start: Position
    end: Position
    """Where the next unit starts."""
    num_bytes_done: int
    """Of the corpus's files, compressed as they are, up to the unit's end."""
    content: bytes = b""
    """Whole lines, or rows as an Arrow stream; nothing for text files."""
    fault: str = ""
    """Instead of content: why the rest of the file cannot be read."""

    @property
    def name(self) -> str:
        """Where it begins, for messages."""
        return f"{self.paths[0]}:{self.start.record + 1}" if self.kind != "text" else self.paths[0]


class FileUnits:
    """The units of some files, in order."""

    def __init__(self, files: Sequence[str], fields: Sequence[str], kind: Kind | None = None) -> None:
        """
        Args:
            fields: those that are needed of a table.
            kind: of all files; None = by their names.
        """
        self._files = files
        self._fields = fields
        self._kind = kind
        self.broken: dict[str, str] = {file: fault for file in files if (fault := broken_link(file))}
        """Files that are none: what is wrong with each."""
        sizes = array("q", (0 if file in self.broken else os.stat(file).st_size for file in files))
        self._starts = array("q", accumulate(sizes, initial=0))
        self.num_bytes: int = self._starts[-1]

    def kind_of(self, path: str) -> Kind:
        """Of one of the files."""
        return self._kind or kind_of(path)

    def units(self, start: Position = Position()) -> Iterator[Unit]:
        """From a unit's start on, by default all."""
        while start.file < len(self._files):
            file = self._files[start.file]
            kind = self.kind_of(file)
            if file in self.broken:
                end = Position(start.file + 1)
                yield Unit(kind, (file,), start, end, self._starts[end.file], fault=self.broken[file])
                start = end
                continue
            if kind == "text":
                unit = self._text_unit(start.file)
                yield unit
                start = unit.end
                continue
            yield from self._line_units(start) if kind == "jsonl" else self._row_units(start, kind)
            start = Position(start.file + 1)

    def _text_unit(self, first: int) -> Unit:
        """Text files from one on: as many as make up a unit."""
        last = first + 1
        while last < len(self._files) and self._starts[last + 1] - self._starts[first] <= UNIT_BYTES:
            if self.kind_of(self._files[last]) != "text" or self._files[last] in self.broken:
                break
            last += 1
        return Unit("text", tuple(self._files[first:last]), Position(first), Position(last), self._starts[last])

    def _line_units(self, start: Position) -> Iterator[Unit]:
        path = self._files[start.file]
        stream, raw = open_file(path)
        with raw, stream:
            blocks = _blocks(stream, start.offset)
            for content, fault in blocks:
                done = self._starts[start.file] + raw.tell()
                if content:
                    end = Position(start.file, start.offset + len(content), start.record + content.count(b"\n"))
                    yield Unit("jsonl", (path,), start, end, done, content)
                    start = end
                if fault:
                    end = Position(start.file + 1)
                    yield Unit("jsonl", (path,), start, end, self._starts[start.file + 1], fault=f"{path}:{start.record + 1}: {fault}")

    def _row_units(self, start: Position, kind: Kind) -> Iterator[Unit]:
        path = self._files[start.file]
        before, after = self._starts[start.file], self._starts[start.file + 1]
        pending: tuple[int, float, bytes] | None = None
        try:
            for piece in read_pieces(path, kind, self._fields, start.record, UNIT_BYTES):
                if pending:
                    end = Position(start.file, 0, piece[0])
                    yield Unit(kind, (path,), start, end, before + int((after - before) * pending[1]), pending[2])
                    start = end
                pending = piece
            end = Position(start.file + 1)
            if pending:
                yield Unit(kind, (path,), start, end, after, pending[2])
        except TableError as error:
            end = Position(start.file + 1)
            if pending:
                yield Unit(kind, (path,), start, end, after, pending[2])
            yield Unit(kind, (path,), start, end, after, fault=f"{path}: {error}")


def _blocks(stream: BufferedIOBase, offset: int) -> Iterator[tuple[bytes, str]]:
    """(whole lines, "") from an offset on, and ("", fault) at the end of a damaged file, with the lines before the damage."""
    parts: list[bytes] = []
    size = 0
    fault = ""
    try:
        stream.seek(offset)
        # A block of exactly UNIT_BYTES is cut at its last line's end, so that where it ends depends on where it begins alone.
        while part := stream.read(min(_READ_BYTES, UNIT_BYTES - size) if size < UNIT_BYTES else _READ_BYTES):
            parts.append(part)
            size += len(part)
            if size >= UNIT_BYTES and (cut := part.rfind(b"\n") + 1):
                rest = part[cut:]
                yield b"".join([*parts[:-1], part[:cut]]), ""
                parts, size = [rest], len(rest)
    except damage() as error:
        fault = f"the compressed file is damaged here: {error}"
    content = b"".join(parts)
    if fault:  # the last line is cut
        content = content[: content.rfind(b"\n") + 1]
    yield content, fault
