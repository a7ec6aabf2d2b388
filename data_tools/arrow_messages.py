"""Sizes of the record batches of an Arrow file, read from the messages' own headers before anything is decoded.

The headers are FlatBuffers (github.com/apache/arrow, format/Message.fbs and File.fbs). Only the fields that are needed are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from os import SEEK_END
from typing import BinaryIO

MAX_METADATA_BYTES = 16 << 20
"""The most bytes of a message's header or of a file's footer, which do not hold data."""
BYTES_PER_VALUE = 8
"""The number of bytes that each value counts in addition to its buffers, because even an absent value takes memory."""
_CONTINUATION = 0xFFFFFFFF
_DICTIONARY, _RECORD_BATCH = 2, 3


class MessageError(ValueError):
    """The error of bytes that are not a header."""


@dataclass(frozen=True, slots=True)
class Message:
    """The header of a message of a stream."""

    is_batch: bool
    is_dictionary: bool
    num_rows: int
    decoded_bytes: int
    """The decompressed bytes of all buffers, and BYTES_PER_VALUE for each value."""
    end: int
    """The byte at which the next message begins."""


def read_message(file: BinaryIO, place: int) -> Message | None:
    """Return the header of the message at a place of the file; None at the end of the stream.

    Raises:
        MessageError: if the bytes are not a header.
    """
    num_bytes = file.seek(0, SEEK_END)
    file.seek(min(place, num_bytes))
    length = int.from_bytes(head := file.read(4), "little")
    if length == _CONTINUATION:
        length = int.from_bytes(head := file.read(4), "little")
    if len(head) < 4 or length == 0:
        return None
    if length > MAX_METADATA_BYTES:
        raise MessageError(f"a message's header has {length} bytes, over the limit of {MAX_METADATA_BYTES}")
    metadata = file.read(length)
    body = file.tell()
    try:
        table = _Table.root(metadata)
        kind, body_length = table.number(1, "<B"), table.number(3, "<q")
        if not 0 <= body_length <= num_bytes - body:
            raise MessageError(f"a message's header claims {body_length} bytes behind it, and the file has {num_bytes - body}")
        if kind not in (_DICTIONARY, _RECORD_BATCH):
            return Message(False, False, 0, body_length, body + body_length)
        batch = table.table(2) if kind == _RECORD_BATCH else table.table(2).table(1)
        num_rows = batch.number(0, "<q")
        num_values = sum(max(0, length) for length, _ in batch.structs(1, "<qq"))
        buffers = list(batch.structs(2, "<qq"))
        is_compressed = batch.has(3)
    except struct.error as error:
        raise MessageError("a message's header is damaged") from error
    if any(not 0 <= offset <= body_length for offset, _ in buffers):
        raise MessageError("a message's header is damaged")
    decoded = _decompressed_bytes(file, body, buffers) if is_compressed else body_length
    decoded += BYTES_PER_VALUE * max(num_values, num_rows)
    return Message(kind == _RECORD_BATCH, kind == _DICTIONARY, max(0, num_rows), decoded, body + body_length)


def _decompressed_bytes(file: BinaryIO, body: int, buffers: list[tuple[int, ...]]) -> int:
    """Return the sum of the decompressed lengths, with which compressed buffers begin; -1 stands for a buffer that is not compressed."""
    total = 0
    for offset, length in buffers:
        if length > 0:
            file.seek(body + offset)
            said = int.from_bytes(file.read(8), "little", signed=True)
            total += max(length, said)
    return total


def footer_blocks(file: BinaryIO, num_bytes: int) -> tuple[list[int], list[int]]:
    """Return where the (dictionaries, record batches) of a file in the file format begin.

    Raises:
        MessageError: if the file has no valid footer.
    """
    file.seek(max(0, num_bytes - 10))
    length = int.from_bytes(file.read(4), "little", signed=True)
    if not 0 < length <= min(MAX_METADATA_BYTES, num_bytes - 10):
        raise MessageError(f"the footer has {length} bytes, which is not a valid length or over the limit of {MAX_METADATA_BYTES}")
    file.seek(num_bytes - 10 - length)
    try:
        footer = _Table.root(file.read(length))
        dictionaries, batches = ([offset for offset, _, _ in footer.structs(field, "<qi4xq")] for field in (2, 3))
    except struct.error as error:
        raise MessageError("the footer is damaged") from error
    if any(place < 0 for place in (*dictionaries, *batches)):
        raise MessageError("the footer is damaged")
    return dictionaries, batches


class _Table:
    """A FlatBuffers table. Reading outside of its bytes raises struct.error."""

    def __init__(self, content: bytes, place: int) -> None:
        self._content = content
        self._place = place
        self._fields = place - self._unpack("<i", place)[0]

    @classmethod
    def root(cls, content: bytes) -> _Table:
        return cls(content, struct.unpack_from("<I", content, 0)[0])

    def _unpack(self, kind: str, place: int) -> tuple[int, ...]:
        if place < 0:
            raise struct.error("outside of the header")
        return struct.unpack_from(kind, self._content, place)

    def _field(self, number: int) -> int:
        """Return where a field is, or 0 if the table does not have it."""
        entry = 4 + 2 * number
        if entry + 2 > self._unpack("<H", self._fields)[0]:
            return 0
        offset = self._unpack("<H", self._fields + entry)[0]
        return self._place + offset if offset else 0

    def has(self, number: int) -> bool:
        return self._field(number) != 0

    def number(self, number: int, kind: str) -> int:
        place = self._field(number)
        return self._unpack(kind, place)[0] if place else 0

    def table(self, number: int) -> _Table:
        if not (place := self._field(number)):
            raise struct.error("no such table")
        return _Table(self._content, place + self._unpack("<I", place)[0])

    def structs(self, number: int, kind: str) -> Iterator[tuple[int, ...]]:
        """Yield the structures of a vector; a missing vector counts as empty."""
        if not (place := self._field(number)):
            return
        start = place + self._unpack("<I", place)[0]
        length = self._unpack("<I", start)[0]
        if start + 4 + length * struct.calcsize(kind) > len(self._content):
            raise struct.error("outside of the header")
        yield from struct.iter_unpack(kind, self._content[start + 4 : start + 4 + length * struct.calcsize(kind)])
