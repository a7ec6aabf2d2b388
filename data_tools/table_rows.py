"""The rows of Parquet and Arrow files in small pieces, as Arrow streams. pyarrow is imported only when such a file is read."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from data_tools.arrow_messages import Message, MessageError, footer_blocks, read_message
from data_tools.corpus_files import Limits, document_fault
from data_tools.fields import schema_fault
from data_tools.parquet_pages import MAX_FOOTER_BYTES, PageError, decoded_size
from data_tools.row_sizes import Known, text_sizes
from w1train.config.errors import first_line
from w1train.data.text.file_names import CorpusError, Kind, compression_of
from w1train.runtime.files import errors_named

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_ONCE = 1024
_ROWS_MEASURED_AT_ONCE = 1 << 16
_DOCUMENTS_AT_ONCE = 4
"""A batch of decoded Parquet rows is at most about as large as this number of documents of the largest allowed size."""
_MAX_THRIFT_CONTAINER = 1_000_000


class TableError(Exception):
    """The error of a file that is not a table or is damaged."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a table, or the number of rows that are left out because they or their row group are over a limit, or the file does not have
    a field."""

    first_row: int
    """The number of rows that precede the piece in the file."""
    share: float
    """The share of the file that has been read after these rows."""
    content: bytes = b""
    """The rows as an Arrow stream."""
    fault: str = ""
    """The part of the message that follows the file's name, for rows that are left out."""
    num_too_large: int = 0
    """The number of rows that are left out because they are over a limit."""
    num_bad: int = 0
    """The number of rows that are left out because a field is missing."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that are together in the file."""

    share: float
    num_rows: int
    batch: pyarrow.RecordBatch | None = None
    """The decoded rows; None if the rows are not decoded."""
    fault: str = ""
    """The reason why the rows are not decoded; empty for rows that are not needed."""
    is_bad: bool = False
    """Tell whether the reason is a missing field, and not a limit."""


def read_pieces(path: str, kind: Kind, fields: Sequence[str], first_row: int, num_bytes: int, limits: Limits) -> Iterator[Piece]:
    """Yield the pieces of a file from row ``first_row`` on, which must be the first row of a piece. ``fields`` may be nested, as in a.b.

    A piece has about ``num_bytes`` bytes of text, or one longer row.

    Raises:
        TableError: at the place from which the file is damaged, or at once if its name says that it is compressed as a whole.
        OSError: if the disk or the network fails; the error has the file's path. The rest of the file may be good.
        CorpusError: if pyarrow is not installed.
    """
    if compression := compression_of(path):
        raise TableError(f"cannot be read: it is a table that is compressed by {compression} as a whole; decompress it first")
    arrow = _pyarrow(path)
    pieces = _Pieces(num_bytes, limits.document)
    row = 0
    try:
        with open(path, "rb") as file, errors_named(path):
            read = _parquet_rows if kind == "parquet" else _arrow_rows
            for rows in read(file, fields, first_row, limits):
                if rows.batch is not None:
                    yield from pieces.add(rows.batch, rows.share, row, max(0, first_row - row))
                elif rows.fault and row >= first_row:
                    yield from pieces.flush()
                    num_bad = rows.num_rows if rows.is_bad else 0
                    yield Piece(row, rows.share, b"", f": {rows.fault}", rows.num_rows - num_bad, num_bad)
                row += rows.num_rows
    # A damaged file may state lengths that exceed any memory, and names that are not text.
    except (arrow.ArrowException, OSError, EOFError, UnicodeDecodeError, MemoryError, PageError, MessageError) as error:
        if _is_of_the_disk(error):
            raise
        yield from pieces.flush()
        raise TableError(f"cannot be read after row {row}: {first_line(error)}") from error
    yield from pieces.flush()


def _is_of_the_disk(error: Exception) -> bool:
    """Tell whether the disk or the network failed, and not the content. An OSError of pyarrow about damaged content has no errno, and a
    damaged file that gives a negative offset makes ``seek`` fail with EINVAL."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def rows_of(piece: bytes) -> Iterator[dict[str, Any] | str]:
    """Yield the rows as dictionaries, or for a row that cannot be read a description of the fault."""
    import pyarrow

    for batch in pyarrow.ipc.open_stream(piece):
        try:
            yield from batch.to_pylist()
        except (
            UnicodeDecodeError,
            ValueError,
            OverflowError,
        ):  # one of the rows cannot be read, for example because of a date that Python does not have
            for i in range(batch.num_rows):
                try:
                    yield batch.slice(i, 1).to_pylist()[0]
                except (UnicodeDecodeError, ValueError, OverflowError) as error:
                    yield f"not readable: {first_line(error)}"


class _Pieces:
    """The pieces that batches of rows are cut into. A piece depends only on its first row, not on the sizes of the batches."""

    def __init__(self, num_bytes: int, max_cell_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._max_cell_bytes = max_cell_bytes
        self._stream = _Stream()
        self._first_row = self._size = 0
        self._share = 0.0

    def add(self, batch: pyarrow.RecordBatch, share: float, row: int, start: int) -> Iterator[Piece]:
        """Add the rows of a batch from its row ``start`` on, and yield the pieces that are now complete.

        Args:
            row: the number of the batch's first row in the file.
        """
        known: Known = {}
        batch = _checked(batch)
        for first in range(start, batch.num_rows, _ROWS_MEASURED_AT_ONCE):
            yield from self._add(batch.slice(first, _ROWS_MEASURED_AT_ONCE), share, row + first, known)

    def _add(self, batch: pyarrow.RecordBatch, share: float, row: int, known: Known) -> Iterator[Piece]:
        sizes = np.stack([text_sizes(column, known) for column in batch.columns] or [np.zeros(batch.num_rows, dtype=np.int64)])
        largest = sizes.max(axis=0)
        ends = np.cumsum(sizes.sum(axis=0) + 1)  # a row without text counts as one byte
        too_large = np.append(np.flatnonzero(largest > self._max_cell_bytes), batch.num_rows)
        place = 0
        while place < batch.num_rows:
            done = int(ends[place - 1]) if place else 0
            stop = int(too_large[np.searchsorted(too_large, place)])
            if stop == place:
                yield from self.flush()
                fault = document_fault(int(largest[place]), self._max_cell_bytes)
                yield Piece(row + place, share, b"", f":{row + place + 1}: {fault}", 1)
                place += 1
                continue
            stop = min(stop, int(np.searchsorted(ends, done + self._num_bytes - self._size, side="right")))
            if stop == place and self._size:
                yield from self.flush()
                continue
            stop = max(stop, place + 1)
            if not self._size:
                self._first_row = row + place
            self._stream.write(_plain(batch.slice(place, stop - place)))
            self._size += int(ends[stop - 1]) - done
            self._share = share
            place = stop

    def flush(self) -> Iterator[Piece]:
        """Yield a piece of the rows that are left, if there are any."""
        if self._size:
            yield Piece(self._first_row, self._share, self._stream.take())
        self._size = 0


class _Stream:
    """A writer of batches to an Arrow stream. It copies them, so that a piece does not keep the large batches that it was cut from."""

    def __init__(self) -> None:
        self._sink: pyarrow.BufferOutputStream | None = None
        self._writer: pyarrow.ipc.RecordBatchStreamWriter | None = None

    def write(self, batch: pyarrow.RecordBatch) -> None:
        import pyarrow

        if self._writer is None:
            self._sink = pyarrow.BufferOutputStream()
            self._writer = pyarrow.ipc.new_stream(self._sink, batch.schema)
        self._writer.write_batch(batch)

    def take(self) -> bytes:
        assert self._writer is not None, "there is a batch to take"
        assert self._sink is not None, "a writer has a sink"
        self._writer.close()
        content: bytes = self._sink.getvalue().to_pybytes()
        self._sink = self._writer = None
        return content


def _parquet_rows(file: BinaryIO, fields: Sequence[str], first_row: int, limits: Limits) -> Iterator[_Rows]:
    from pyarrow import parquet

    _check_footer(file)
    # The parts of a row group are read when they are needed. Reading ahead would bring the whole group into memory.
    table = parquet.ParquetFile(
        file, pre_buffer=False, thrift_string_size_limit=MAX_FOOTER_BYTES, thrift_container_size_limit=_MAX_THRIFT_CONTAINER
    )
    if fault := schema_fault(table.schema_arrow, fields):
        yield _Rows(1.0, table.metadata.num_rows, fault=fault, is_bad=True)
        return
    row = 0
    for number in range(table.num_row_groups):
        num_rows = max(0, table.metadata.row_group(number).num_rows)
        share = (number + 1) / table.num_row_groups
        if row + num_rows <= first_row:
            yield _Rows(share, num_rows)
        else:
            size = decoded_size(file, table.metadata, number, fields, limits.row_group)
            if size.total > limits.row_group:
                yield _Rows(share, num_rows, fault=_group_fault("row group", row, num_rows, size.total, limits))
            else:
                row_bytes = max(size.largest_row, size.total // max(num_rows, 1), 1)
                rows_at_once = min(max(_DOCUMENTS_AT_ONCE * limits.document // row_bytes, 1), _ROWS_AT_ONCE)
                batches = table.iter_batches(rows_at_once, row_groups=[number], columns=list(fields), use_threads=False)
                yield from _within(batches, row, num_rows, (number / table.num_row_groups, share), limits)
        row += num_rows


def _within(
    batches: Iterator[pyarrow.RecordBatch], row: int, num_rows: int, shares: tuple[float, float], limits: Limits
) -> Iterator[_Rows]:
    """Yield the batches of a row group until they exceed the limit. Decoded values may be many times as long as the encoded ones."""
    num_done = num_bytes = 0
    for batch in batches:
        num_bytes += batch.nbytes
        if num_bytes > limits.row_group:
            num_left = num_rows - num_done
            yield _Rows(shares[1], num_left, fault=_group_fault("row group", row + num_done, num_left, None, limits))
            return
        num_done += batch.num_rows
        yield _Rows(shares[0] + (shares[1] - shares[0]) * num_done / max(num_rows, num_done), batch.num_rows, batch)


def _group_fault(kind: str, row: int, num_rows: int, num_bytes: int | None, limits: Limits) -> str:
    limit = limits.row_group
    found = f"{num_bytes} bytes decoded, over the limit of {limit}" if num_bytes else f"more than the limit of {limit} bytes decoded"
    return f"the {kind} with the rows {row + 1} to {row + num_rows} has {found} (--max-row-group-size)"


def _check_footer(file: BinaryIO) -> None:
    """Refuse a footer over the limit, since parsing a footer takes many times its length in memory."""
    num_bytes = file.seek(0, 2)
    file.seek(max(0, num_bytes - 8))
    length = int.from_bytes(file.read(4), "little")
    file.seek(0)
    if MAX_FOOTER_BYTES < length < num_bytes:  # pyarrow refuses a length that exceeds the file's length
        raise TableError(f"has a footer of {length} bytes, over the limit of {MAX_FOOTER_BYTES}")


def _arrow_rows(file: BinaryIO, fields: Sequence[str], first_row: int, limits: Limits) -> Iterator[_Rows]:
    """Yield the record batches of the file format or the stream format, which Hugging Face writes under the same ending."""
    num_bytes = file.seek(0, 2)
    file.seek(0)
    magic = file.read(6)
    file.seek(0)
    schema, batches = _arrow_file(file, num_bytes, limits) if magic == b"ARROW1" else _arrow_stream(file, limits)
    if fault := schema_fault(schema, fields):
        yield _Rows(1.0, sum(message.num_rows for message, _ in batches), fault=fault, is_bad=True)
        return
    columns = [name for name in schema.names if name in {_column(schema, field) for field in fields}]
    row = 0
    for message, read in batches:
        share = min(message.end / num_bytes, 1.0)
        if message.decoded_bytes > limits.row_group:
            fault = _group_fault("record batch", row, message.num_rows, message.decoded_bytes, limits)
            yield _Rows(share, message.num_rows, fault=fault)
        elif row + message.num_rows <= first_row:
            yield _Rows(share, message.num_rows)
        else:
            batch = read().select(columns)
            num_text_bytes = _text_bytes(batch)
            if num_text_bytes > limits.row_group:
                yield _Rows(share, message.num_rows, fault=_group_fault("record batch", row, message.num_rows, num_text_bytes, limits))
            else:
                yield _Rows(share, message.num_rows, batch)
        row += message.num_rows


def _text_bytes(batch: pyarrow.RecordBatch) -> int:
    """Count the bytes of all texts of a batch, each as often as rows refer to it: a dictionary's entry and what views share, too."""
    batch = _checked(batch)
    parts = (batch.slice(first, _ROWS_MEASURED_AT_ONCE) for first in range(0, batch.num_rows, _ROWS_MEASURED_AT_ONCE))
    known: Known = {}
    return sum(int(text_sizes(column, known).sum()) for part in parts for column in part.columns)


type _Batches = Iterator[tuple[Message, Callable[[], pyarrow.RecordBatch]]]


def _arrow_file(file: BinaryIO, num_bytes: int, limits: Limits) -> tuple[pyarrow.Schema, _Batches]:
    """Return, for the file format, the schema, and the header of each record batch with a function that reads the batch."""
    from pyarrow import ipc

    dictionaries, batches = footer_blocks(file, num_bytes)
    _check_dictionaries([read_message(file, place) for place in dictionaries], limits)
    reader = ipc.open_file(file)
    headers = ((read_message(file, place), partial(reader.get_batch, number)) for number, place in enumerate(batches))
    return reader.schema, ((_record_batch(header), read) for header, read in headers)


def _arrow_stream(file: BinaryIO, limits: Limits) -> tuple[pyarrow.Schema, _Batches]:
    """Return, for the stream format, the schema, and the header of each record batch with a function that reads the batch."""
    from pyarrow import ipc

    if (schema := read_message(file, 0)) is None:
        raise MessageError("the file has no schema")
    parts = _Parts(file)
    parts.add(0, schema.end)
    reader = ipc.open_stream(parts)

    def batches() -> _Batches:
        place, dictionaries = schema.end, []
        while message := read_message(file, place):
            if message.is_dictionary:
                dictionaries.append(message)
                _check_dictionaries(dictionaries, limits)
                parts.add(place, message.end)
            else:
                yield _record_batch(message), partial(_read_part, reader, parts, place, message.end)
            place = message.end

    return reader.schema, batches()


def _read_part(reader: pyarrow.RecordBatchReader, parts: _Parts, start: int, stop: int) -> pyarrow.RecordBatch:
    parts.add(start, stop)
    return reader.read_next_batch()


class _Parts:
    """A file that consists of parts of another file, so that the reader of a stream never sees record batches that are left out."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._parts: deque[tuple[int, int]] = deque()
        self.closed = False

    def add(self, start: int, stop: int) -> None:
        """Append the bytes from ``start`` to ``stop``."""
        self._parts.append((start, stop))

    def read(self, size: int) -> bytes:
        """Read the next bytes. Fewer than ``size`` are returned only at the end of the last part."""
        content = bytearray()
        while self._parts and len(content) < size:
            start, stop = self._parts.popleft()
            self._file.seek(start)
            content += self._file.read(min(stop - start, size - len(content)))
            start = self._file.tell()
            if start < stop and len(content) == size:
                self._parts.appendleft((start, stop))
        return bytes(content)

    def close(self) -> None:
        """Do nothing: the other file belongs to its opener."""
        self.closed = True


def _record_batch(message: Message | None) -> Message:
    if message is None or not message.is_batch:
        raise MessageError("a message is not a record batch")
    return message


def _check_dictionaries(messages: Sequence[Message | None], limits: Limits) -> None:
    num_bytes = sum(message.decoded_bytes for message in messages if message)
    if num_bytes > limits.row_group:
        found = f"{num_bytes} bytes decoded, over the limit of {limits.row_group}"
        raise MessageError(f"its dictionaries have {found} (--max-row-group-size)")


def _plain(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Give each value memory of its own. Otherwise every piece would contain the whole dictionary, or all the text that views refer to."""
    import pyarrow
    from pyarrow import compute, types

    columns = []
    for column in batch.columns:
        if types.is_dictionary(column.type):
            column = column.dictionary_decode()
        elif types.is_run_end_encoded(column.type):
            column = compute.run_end_decode(column)
        if types.is_string_view(column.type) or types.is_binary_view(column.type):
            column = column.cast(pyarrow.large_binary())
        columns.append(_as_bytes(column))
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _as_bytes(column: pyarrow.Array) -> pyarrow.Array:
    """Return strings as bytes, so that a string that is not UTF-8 makes one row bad, not the batch."""
    import pyarrow

    bytes_of = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    return column.view(bytes_of[column.type]) if column.type in bytes_of else column


def _checked(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Refuse a batch with offsets that lead outside of it."""
    import pyarrow

    batch = pyarrow.RecordBatch.from_arrays([_as_bytes(column) for column in batch.columns], names=batch.schema.names)
    batch.validate(full=True)
    return batch


def _column(schema: pyarrow.Schema, field: str) -> str:
    return field if field in schema.names else field.partition(".")[0]


def _pyarrow(path: str) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise CorpusError(f"{path} needs pyarrow to be read: pip install 'w1train[data]'") from None
    return pyarrow
