"""Rows of Parquet and Arrow files in small pieces, as Arrow streams; pyarrow is needed only where this is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data_tools.files import CorpusError, Kind

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_ONCE = 1024


class TableError(Exception):
    """A file that is no table, is damaged, or lacks a column."""


def read_pieces(path: str, kind: Kind, fields: Sequence[str], first_row: int, num_bytes: int) -> Iterator[tuple[int, float, bytes]]:
    """(rows before the piece, share of the file that is read after it, the piece) from a row on; ``fields`` may be nested, a.b.

    A piece has about ``num_bytes``, or one row that is longer.

    Raises:
        TableError: at what cannot be read.
        CorpusError: if pyarrow is not installed.
    """
    arrow = _pyarrow(path)
    row = 0
    try:
        with open(path, "rb") as file:
            batches = _parquet_batches(file, fields) if kind == "parquet" else _arrow_batches(file, fields)
            for share, batch in batches:
                step = max(1, batch.num_rows * num_bytes // max(batch.nbytes, 1))
                for start in range(0, batch.num_rows, step):
                    piece = batch.slice(start, step)
                    if row >= first_row:
                        yield row, share, _serialize(piece)
                    row += piece.num_rows
    # A damaged file may claim lengths that no memory has, and names that are no text.
    except (arrow.ArrowException, OSError, EOFError, UnicodeDecodeError, MemoryError) as error:
        raise TableError(f"cannot be read after row {row}: {_first_line(error)}") from error


def rows_of(piece: bytes) -> Iterator[dict[str, Any] | str]:
    """Rows as dictionaries, or what is wrong with one."""
    import pyarrow

    for batch in pyarrow.ipc.open_stream(piece):
        try:
            yield from batch.to_pylist()
        except (UnicodeDecodeError, ValueError, OverflowError):  # of one row among them; dates that Python has not, say
            for i in range(batch.num_rows):
                try:
                    yield batch.slice(i, 1).to_pylist()[0]
                except (UnicodeDecodeError, ValueError, OverflowError) as error:
                    yield f"not readable: {_first_line(error)}"


def _parquet_batches(file: Any, fields: Sequence[str]) -> Iterator[tuple[float, pyarrow.RecordBatch]]:
    from pyarrow import parquet

    # The parts of a row group are read when they are needed: ahead of it, memory would hold all of the group.
    table = parquet.ParquetFile(file, pre_buffer=False)
    _check_columns(table.schema_arrow, fields)
    num_rows = 0
    for batch in table.iter_batches(_ROWS_AT_ONCE, columns=list(fields), use_threads=False):
        num_rows += batch.num_rows
        yield num_rows / max(table.metadata.num_rows, 1), _checked(batch)


def _arrow_batches(file: Any, fields: Sequence[str]) -> Iterator[tuple[float, pyarrow.RecordBatch]]:
    """Of the file format or the stream format, which Hugging Face writes under the same ending."""
    from pyarrow import ipc

    num_bytes = file.seek(0, 2)
    file.seek(0)
    magic = file.read(6)
    file.seek(0)
    reader = ipc.open_file(file) if magic == b"ARROW1" else ipc.open_stream(file)
    _check_columns(reader.schema, fields)
    columns = [name for name in reader.schema.names if name in {_column(reader.schema, field) for field in fields}]
    batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if magic == b"ARROW1" else reader
    for batch in batches:
        yield file.tell() / num_bytes, _checked(batch.select(columns))


def _checked(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Without offsets that lead outside of it; strings as bytes, so that one that is not UTF-8 is one bad row, not a bad batch."""
    import pyarrow

    bytes_of = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    columns = [column.view(bytes_of[column.type]) if column.type in bytes_of else column for column in batch.columns]
    batch = pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
    batch.validate(full=True)
    return batch


def _check_columns(schema: pyarrow.Schema, fields: Sequence[str]) -> None:
    if missing := [field for field in fields if _column(schema, field) not in schema.names]:
        raise TableError(f"has no column {', '.join(map(repr, missing))}; its columns: {', '.join(schema.names)}")


def _column(schema: pyarrow.Schema, field: str) -> str:
    return field if field in schema.names else field.partition(".")[0]


def _serialize(batch: pyarrow.RecordBatch) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _pyarrow(path: str) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise CorpusError(f"{path} needs pyarrow to be read: pip install 'w1train[data]'") from None
    return pyarrow
