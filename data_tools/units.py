"""The units of a corpus: pieces that fit into memory, each of which depends on the input alone.

Every process that reads the units gets the same documents in the same order, and may begin at any unit. So the output does not depend on
the number of workers, and a killed run can resume.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from data_tools.corpus_files import Limits, broken_link, document_fault
from data_tools.lines import LineBlocks
from data_tools.table_rows import Piece, TableError, read_pieces
from w1train.data.text.file_names import Kind, compression_of, kind_of
from w1train.data.text.json_records import RecordReader

UNIT_BYTES = 1 << 19
_DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a corpus."""

    file: int = 0
    """The number of files before the place."""
    offset: int = 0
    """The number of decompressed bytes before the place in its file; 0 in a table."""
    record: int = 0
    """The number of lines or rows before the place in its file."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a corpus: text files, which the reader opens, or lines or rows of a file. A unit that ends where it starts only reports
    progress."""

    kind: Kind
    paths: tuple[str, ...]
    start: Position
    end: Position
    """The place where the next unit starts."""
    num_bytes_done: int
    """The number of bytes of the corpus's files, before decompression, up to the end of the unit."""
    content: bytes = b""
    """Whole lines, or rows as an Arrow stream; empty for text files."""
    fault: str = ""
    """In a unit without content, the reason why the rest of the file cannot be read, or the message about input over a limit."""
    num_too_large: int = 0
    """The number of lines or rows that are left out because they or their row group are over a limit."""
    num_bad: int = 1
    """The number of lines or rows that are left out because of a fault that is not a limit."""
    num_bytes_passed: int = 0
    """The number of bytes decoded and dropped since the last unit."""

    @property
    def name(self) -> str:
        """Return the file and the line or row where the unit begins, for messages."""
        return f"{self.paths[0]}:{self.start.record + 1}" if self.kind != "text" else self.paths[0]


class FileUnits:
    """The units of files, in order."""

    def __init__(
        self,
        files: Sequence[str],
        fields: Sequence[str],
        kind: Kind | None = None,
        *,
        limits: Limits = _DEFAULT_LIMITS,
        passes_over: bool = False,
    ) -> None:
        """
        Args:
            fields: the fields that are needed of a table.
            kind: what all files hold; None = the name of each file tells what it holds.
            passes_over: skip input over a limit, and continue to read after it; otherwise reading of the file ends there.
        """
        self._limits = limits
        self._passes_over = passes_over
        self._files = files
        self._fields = fields
        self._kind = kind
        self.broken: dict[str, str] = {file: fault for file in files if (fault := broken_link(file))}
        """The broken links among the files, each with a description of its fault."""
        sizes = array("q", (0 if file in self.broken else os.stat(file).st_size for file in files))
        self._starts = array("q", accumulate(sizes, initial=0))
        self.num_bytes: int = self._starts[-1]

    def kind_of(self, path: str) -> Kind:
        """Return what a file of the corpus holds."""
        return self._kind or kind_of(path)

    def units(self, start: Position = Position()) -> Iterator[Unit]:
        """Yield the units in order, from the unit that begins at ``start`` on; by default all units."""
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
            yield from self._line_units(start, kind) if kind in ("jsonl", "json") else self._row_units(start, kind)
            start = Position(start.file + 1)

    def _text_unit(self, first: int) -> Unit:
        """Return a unit of text files: the file with the number ``first``, and as many of the following files as fit. A compressed file,
        whose content may have any size, is a unit alone."""
        last = first + 1
        is_alone = compression_of(self._files[first]) is not None
        while not is_alone and last < len(self._files) and self._starts[last + 1] - self._starts[first] <= UNIT_BYTES:
            name = self._files[last]
            if self.kind_of(name) != "text" or name in self.broken or compression_of(name) is not None:
                break
            last += 1
        return Unit("text", tuple(self._files[first:last]), Position(first), Position(last), self._starts[last])

    def _line_units(self, start: Position, kind: Kind) -> Iterator[Unit]:
        path = self._files[start.file]
        before, after = self._starts[start.file], self._starts[start.file + 1]
        with RecordReader(path, kind, self._limits.row_group) as stream:
            for block in LineBlocks(stream, start.offset, UNIT_BYTES, self._limits.document):
                if block.announces_long_line and not self._passes_over:
                    fault = f"{path}:{start.record + 1}: {document_fault(None, self._limits.document)}"
                    yield Unit("jsonl", (path,), start, Position(start.file + 1), after, fault=fault, num_too_large=1)
                    return
                if block.fault:
                    fault = f"{path}:{start.record + 1}: {block.fault}"
                    end = Position(start.file + 1)
                    yield Unit("jsonl", (path,), start, end, after, fault=fault, num_too_large=int(block.needs_memory))
                    return
                num_long = int(block.long_line is not None)
                fault = f"{path}:{start.record + 1}: {document_fault(block.long_line, self._limits.document)}" if num_long else ""
                num_lines = block.content.count(b"\n") + num_long
                end = Position(start.file, start.offset + block.length, start.record + num_lines)
                done = end.offset if block.length and stream.num_bytes is not None else stream.num_bytes_read
                num_passed, done = block.num_bytes_passed, min(before + done, after)
                yield Unit("jsonl", (path,), start, end, done, block.content, fault, num_long, num_bytes_passed=num_passed)
                start = end

    def _row_units(self, start: Position, kind: Kind) -> Iterator[Unit]:
        path = self._files[start.file]
        before, after = self._starts[start.file], self._starts[start.file + 1]
        pending: Piece | None = None
        fault = ""
        try:
            for piece in read_pieces(path, kind, self._fields, start.record, UNIT_BYTES, self._limits):
                if pending:
                    end = Position(start.file, 0, piece.first_row)
                    yield self._row_unit(path, start, end, before + int((after - before) * pending.share), pending)
                    start = end
                pending = piece
                if piece.fault and not self._passes_over:
                    break
        except TableError as error:
            fault = f"{path}: {error}"
        end = Position(start.file + 1)
        if pending:
            yield self._row_unit(path, start, end, after, pending)
        if fault:
            yield Unit(kind, (path,), start, end, after, fault=fault)

    def _row_unit(self, path: str, start: Position, end: Position, num_bytes_done: int, piece: Piece) -> Unit:
        fault = f"{path}{piece.fault}" if piece.fault else ""
        kind = self.kind_of(path)
        return Unit(kind, (path,), start, end, num_bytes_done, piece.content, fault, piece.num_too_large, piece.num_bad)
