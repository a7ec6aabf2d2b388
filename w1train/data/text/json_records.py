"""Records of JSON files as lines: a file of lines, an array of records, or one record over several lines.

An array is read as a stream. Outside of texts, the commas between its records become line feeds, and its own line feeds become blanks. No
byte is added or removed, so that offsets and lines can be counted as in a file of lines.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from decimal import Decimal
from itertools import islice
from typing import Any, Literal

from w1train.data.text.decompress import DEFAULT_WINDOW, ContentReader, DamagedError, WindowError
from w1train.data.text.file_names import Kind

BYTE_ORDER_MARK = "\ufeff"
_LONGEST_INTEGER = 4000
"""The digits up to which Python converts a text to an integer, with some distance to its limit of 4,300."""
_HEAD_CHUNKS = 256
"""The chunks in which the first record is looked for. A file may begin with any amount of white space, and a compressed file with small
pieces."""
_HEAD_BYTES = 1 << 12
_OTHER_ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Possessive quantifiers, since a text of many megabytes would otherwise fill the matcher's stack.
_TOKEN = re.compile(rb'"|[\[{\]},\n]|[^"\[{\]},\s]++')
_FIRST_RECORD = re.compile(r"\s*+(?:\[\s*+)?(?:\{\s*+\}[\s,]*+)*+(?=\{)")
"""The places before the first object that has keys."""
_REST_OF_TEXT = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


class NestingError(ValueError):
    """The error of a JSON text that is nested too deeply for Python. The text may be right."""


type Shape = Literal["lines", "array", "object"]


class RecordReader(ContentReader):
    """A reader of a JSON file, whose chunks have a record on each line."""

    def __init__(self, path: str, kind: Kind, max_window: int = DEFAULT_WINDOW) -> None:
        """
        Args:
            kind: "jsonl" for a file of lines; "json" for a file whose first bytes show how its records are laid out.

        Raises:
            CorpusError, OSError: as :class:`ContentReader`.
        """
        super().__init__(path, max_window)
        self._path, self._kind, self._max_window = path, kind, max_window

    def chunks(self, offset: int = 0) -> Iterator[bytes]:
        """Yield the content as ``ContentReader.chunks`` does, from the beginning of a line on.

        Raises:
            DamagedError: also if the file is not UTF-8 but UTF-16, or if an array has no end.
        """
        with ContentReader(self._path, self._max_window) as reader:
            head = _head(reader.chunks())
        if head.startswith(_OTHER_ENCODINGS):
            raise DamagedError("the file is UTF-16 or UTF-32: convert it to UTF-8")
        shape = shape_of(head) if self._kind == "json" else "lines"
        if shape == "lines":
            yield from super().chunks(offset)
            return
        num_bytes = 0
        for chunk in _Folded(shape, offset > 0).chunks(super().chunks(max(0, offset - 1))):
            num_bytes += len(chunk)
            yield chunk
        if offset and not num_bytes:  # behind the last line, only the whole content tells whether its array has an end
            with RecordReader(self._path, self._kind, self._max_window) as reader:
                yield from (b"" for _ in reader.chunks())


def _head(chunks: Iterator[bytes]) -> bytes:
    """Return the first bytes of a file, from the first chunk that is not blank to the second line at least, or ``_HEAD_BYTES``.

    A fault ends the head. The reading of the records then finds it after the lines that come before it.
    """
    head = b""
    try:
        for chunk in islice(chunks, _HEAD_CHUNKS):
            head += chunk if head or chunk.strip() else b""
            if len(head) >= _HEAD_BYTES or head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")[2]:
                break
    except (DamagedError, WindowError):
        pass
    return head


def shape_of(head: bytes) -> Shape:
    """Return how the records of a file are laid out, given its first bytes.

    Each line of a file of lines is a record, so its first line is whole. The first line of a record over several lines ends where a
    record cannot.
    """
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        return "array"
    first, _, rest = head.partition(b"\n")
    return "object" if rest and first.startswith(b"{") and first.rstrip().endswith((b"{", b"[", b",", b":")) else "lines"


class _Folded:
    """The content of an array, or of records over several lines, as lines of records."""

    def __init__(self, shape: Shape, is_inside: bool) -> None:
        """
        Args:
            is_inside: whether the chunks begin with the last byte of a line, and so in an array with the comma or bracket before a record.
        """
        self._is_array, self._is_inside = shape == "array", is_inside
        self._depth = int(self._is_array and is_inside)
        self._is_empty = True
        """Tell whether the line has had no value so far."""
        self._in_text = self._is_escaped = False
        self._is_after_comma = False

    def chunks(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the chunks with a record on each line.

        A byte order mark at the start of the file stays before the first record. The last byte of the line before the chunks is left out.

        Raises:
            DamagedError: if an array has no end. If there is no content, its end may have come before.
        """
        has_content, has_line_before = False, self._is_inside
        for chunk in chunks:
            if has_line_before and chunk:
                self._is_after_comma = chunk.startswith(b",")
                chunk, has_line_before = chunk[1:], False
            is_marked = not self._is_inside and not has_content and chunk.startswith(codecs.BOM_UTF8)
            mark = codecs.BOM_UTF8 if is_marked else b""
            has_content = has_content or bool(chunk)
            yield mark + self._fold(chunk[len(mark) :])
        if self._is_array and self._depth and has_content:
            raise DamagedError("the JSON array has no end")

    def _fold(self, chunk: bytes) -> bytes:
        folded = bytearray(chunk)
        place = 0
        while place < len(chunk):
            if self._in_text:
                place = self._skip_text(chunk, folded, place)
            elif token := _TOKEN.search(chunk, place):
                place = token.end()
                if token.group() == b'"':
                    self._in_text, self._is_empty = True, False
                elif len(token.group()) > 1 or not self._take(chunk[token.start()], folded, token.start()):
                    self._is_empty = False
            else:
                break
        return bytes(folded)

    def _skip_text(self, chunk: bytes, folded: bytearray, place: int) -> int:
        """Return where a text ends. A line feed in a text is not JSON. It becomes another character that is not, so that the record
        stays one line."""
        start, stop = place, place + 1
        if not self._is_escaped:
            match = _REST_OF_TEXT.match(chunk, place)
            assert match is not None, "the pattern matches nothing, too"
            stop = match.end() + 1
        last = chunk[stop - 1 : stop]
        self._in_text = self._is_escaped or last != b'"'
        self._is_escaped = not self._is_escaped and last == b"\\"
        folded[start:stop] = chunk[start:stop].replace(b"\n", b"\v")
        return stop

    def _take(self, character: int, folded: bytearray, place: int) -> bool:
        """Change a character outside of texts where it must be changed, and return whether the character only separates records."""
        is_outside = self._depth == int(self._is_array)
        match chr(character):
            case "," | "]" if self._is_array and is_outside and self._is_empty and (character == ord(",") or self._is_after_comma):
                self._depth -= character == ord("]")
                return False  # An element is missing, which is not JSON. The character stays, so that its line is not JSON either.
            case "[" if self._is_array and not self._depth:  # a second array begins a line of its own
                folded[place] = ord(" " if self._is_empty else "\n")
                self._is_after_comma = False
            case "," if self._is_array and is_outside:
                folded[place] = ord("\n")
                self._is_after_comma = True
            case "]" if self._is_array and is_outside:
                folded[place] = ord(" ")
                self._depth -= 1
                return True
            case "\n":
                if self._is_array or self._depth:
                    folded[place] = ord(" ")
                return True
            case "[" | "{":
                self._depth += 1
                return False
            case "]" | "}":
                self._depth -= self._depth > int(self._is_array)
                return False
            case _:
                return False
        self._depth, self._is_empty = int(self._is_array), True
        return True


def parse_record(line: str) -> Any:
    """Return the value of a line of JSON. A byte order mark before it is dropped. An integer that is too long for Python becomes a Decimal.

    Raises:
        NestingError: if the line is nested too deeply.
        ValueError: if the line is not JSON.
    """
    line = line.removeprefix(BYTE_ORDER_MARK)
    try:
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            raise
        except ValueError:  # Python's limit on digits, which nothing but the text of its error tells apart
            return json.loads(line, parse_int=_integer)
    except RecursionError as error:
        raise NestingError("the lists and objects are nested too deeply to be read") from error


def begins_with_record(text: str) -> bool:
    """Tell whether a text begins with a complete JSON object that has keys, also as an element of an array."""
    start = _FIRST_RECORD.match(text)
    if start is None:
        return False
    try:
        json.JSONDecoder(parse_int=_integer).raw_decode(text, start.end())
    except RecursionError:  # All that comes before the thousandth level is JSON.
        return True
    except ValueError:
        return False
    return True


def has_lines_of_records(text: str) -> bool:
    """Tell whether two or more lines, and all lines but the first, are JSON objects that have keys.

    Such a text is lines of JSON behind a heading, or a part of a file of lines, which begins in the middle of a line. The last line of a
    part may be cut too.
    """
    num_records, start = 0, text.find("\n") + 1
    while 0 < start < len(text):
        stop = text.find("\n", start)
        line = text[start : stop if stop >= 0 else len(text)].strip()
        start = stop + 1
        if not line:
            continue
        if not line.startswith("{"):
            return False
        if not _is_record(line):
            return num_records > 0 and stop < 0
        num_records += 1
    return num_records > 1


def _is_record(line: str) -> bool:
    try:
        return bool(parse_record(line))
    except NestingError:
        return True
    except ValueError:
        return False


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else Decimal(digits)
