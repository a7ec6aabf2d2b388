"""Decoded sizes of a Parquet row group, read from the headers of its pages, since the file's footer may state any size.

The headers are small structures in Thrift's compact protocol (github.com/apache/parquet-format, parquet.thrift).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import pyarrow.parquet

MAX_FOOTER_BYTES = 16 << 20
"""The most bytes of a footer, which takes up to some hundred times as much memory. A footer of ten thousand row groups of ten columns has
this length."""
BYTES_PER_VALUE = 8
"""The number of bytes that each value counts in addition, because even an absent value has levels and an offset while it is decoded."""
_DELTA_BYTE_ARRAY = 7
_MAX_DEPTH = 8
_MAX_STRING_BYTES = 16 << 20
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)

type _Struct = dict[int, int | _Struct]


class PageError(ValueError):
    """The error of bytes that are not a page header."""


@dataclass(frozen=True, slots=True)
class DecodedSize:
    """The decoded sizes of those columns of a row group that are read, in bytes."""

    total: int
    """The decompressed bytes of all pages, with the largest possible size of values in lists, and BYTES_PER_VALUE for each value."""
    largest_row: int
    """The largest size that an encoding which repeats values, or parts of them, may give to a value, summed over the columns."""


def decoded_size(file: BinaryIO, metadata: pyarrow.parquet.FileMetaData, row_group: int, fields: Sequence[str], limit: int) -> DecodedSize:
    """Return the sizes that the headers of the pages state. If the footer already states more than the limit, the pages are not read.

    Raises:
        PageError: if a page has no valid header.
    """
    group, schema = metadata.row_group(row_group), metadata.schema
    wanted = [i for i in range(group.num_columns) if _is_wanted(group.column(i).path_in_schema, fields)]
    columns = [group.column(i) for i in wanted]
    said = sum(max(0, column.total_uncompressed_size) + BYTES_PER_VALUE * max(0, column.num_values) for column in columns)
    if said > limit:
        return DecodedSize(said, 0)
    sizes = [_column_size(file, column, schema.column(i).max_repetition_level > 0) for i, column in zip(wanted, columns, strict=True)]
    return DecodedSize(sum(size.total for size in sizes), sum(size.largest_row for size in sizes))


def _is_wanted(path: str, fields: Sequence[str]) -> bool:
    return any(path == field or path.startswith(f"{field}.") for field in fields)


def _column_size(file: BinaryIO, column: pyarrow.parquet.ColumnChunkMetaData, is_repeated: bool) -> DecodedSize:
    num_bytes = num_values = largest = 0
    place = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < place:
        place = column.dictionary_page_offset
    stop = place + column.total_compressed_size
    while place < stop and num_values < column.num_values:
        file.seek(place)
        header = _read_struct(file, 0)
        decoded, stored = _number(header, 2), _number(header, 3)
        data = next((part for key in (5, 8) if isinstance(part := header.get(key), dict)), {})
        encoding = _number(data, 4 if 8 in header else 2) if data else None
        if 7 in header or encoding == _DELTA_BYTE_ARRAY:  # the page holds a dictionary, or values that share beginnings
            largest = max(largest, decoded)
        num_values += _number(data, 1) if data else 0
        num_bytes += decoded
        place = file.tell() + stored
    repeated = num_values * largest if is_repeated else 0
    return DecodedSize(num_bytes + repeated + BYTES_PER_VALUE * num_values, largest)


def _number(struct: _Struct, key: int) -> int:
    value = struct.get(key)
    if not isinstance(value, int) or value < 0:
        raise PageError("a page header is damaged")
    return value


def _read_struct(file: BinaryIO, depth: int) -> _Struct:
    """Return the numbers and structures in a structure, by the numbers of their fields. Other fields are skipped."""
    if depth > _MAX_DEPTH:
        raise PageError("a page header is nested too deeply")
    fields: _Struct = {}
    key = 0
    while head := _byte(file):
        key = key + (head >> 4) if head >> 4 else _zigzag(file)
        value = _read_value(file, head & 15, depth)
        if value is not None:
            fields[key] = value
    return fields


def _read_value(file: BinaryIO, kind: int, depth: int) -> int | _Struct | None:
    match kind:
        case _ if kind in (_I16, _I32, _I64):
            return _zigzag(file)
        case _ if kind == _STRUCT:
            return _read_struct(file, depth + 1)
        case _ if kind in (_TRUE, _FALSE):
            return None
        case _ if kind in (_BYTE, _DOUBLE):
            file.read(1 if kind == _BYTE else 8)
            return None
        case _ if kind == _BINARY and (length := _varint(file)) <= _MAX_STRING_BYTES:
            file.seek(length, 1)
            return None
    raise PageError("a page header has a field of a type that page headers do not have")


def _zigzag(file: BinaryIO) -> int:
    number = _varint(file)
    return (number >> 1) ^ -(number & 1)


def _varint(file: BinaryIO) -> int:
    number = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise PageError("a page header has a number that is too long")


def _byte(file: BinaryIO) -> int:
    if not (byte := file.read(1)):
        raise PageError("a page header lies beyond the end of the file")
    return byte[0]
