"""Sizes of rows and of messages of Arrow files, before anything is decoded."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.arrow_messages import MessageError, _Table, read_message
from data_tools.row_sizes import text_sizes
from tests.slow import examples

pa = pytest.importorskip("pyarrow")


def arrays():
    text = st.text(max_size=5)
    maybe = st.none() | text
    lists = st.none() | st.lists(maybe, max_size=3)
    kinds = [
        (pa.string(), maybe),
        (pa.large_binary(), st.none() | st.binary(max_size=5)),
        (pa.string_view(), st.none() | st.text(max_size=30)),
        (pa.dictionary(pa.int8(), pa.string()), maybe),
        (pa.list_(pa.string()), lists),
        (pa.large_list(pa.string()), lists),
        (pa.list_view(pa.string()), lists),
        (pa.list_(pa.string(), 2), st.none() | st.lists(maybe, min_size=2, max_size=2)),
        (pa.struct({"a": pa.string(), "b": pa.list_(pa.string())}), st.none() | st.fixed_dictionaries({"a": maybe, "b": lists})),
        (pa.map_(pa.string(), pa.string()), st.none() | st.lists(st.tuples(text, maybe), max_size=3)),
        (pa.int64(), st.none() | st.integers(0, 9)),
    ]
    return st.sampled_from(kinds).flatmap(lambda kind: st.lists(kind[1], max_size=6).map(lambda rows: pa.array(rows, kind[0])))


def size_of(value) -> int:
    match value:
        case str():
            return len(value.encode())
        case bytes():
            return len(value)
        case list():
            return sum(size_of(element) + 8 for element in value)
        case dict() | tuple():
            return sum(map(size_of, value.values() if isinstance(value, dict) else value))
    return 0


@settings(max_examples=examples(60))
@given(array=arrays(), start=st.integers(0, 3))
def test_rows_are_as_large_as_their_values(array, start):
    rows = array.slice(start)
    expected = [size_of(row) for row in rows.to_pylist()]
    assert text_sizes(rows).tolist() == expected
    known = {}
    for first in range(len(rows)):
        assert text_sizes(rows.slice(first, 2), known).tolist() == expected[first : first + 2], "what slices share is measured once"


@pytest.mark.parametrize(("field", "value"), [("body", 2**63 - 1), ("offset", 2**62)])
def test_lengths_that_lead_outside_of_the_file_are_an_error(tmp_path, field, value):
    """A length above what a file can have must not reach seek, which raises OverflowError or ValueError."""
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "a.arrow"
    batch = pa.record_batch({"text": pa.array(["one", "two"] * 50)})
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer,
    ):
        writer.write_batch(batch)
    content = path.read_bytes()
    with open(path, "rb") as file:
        start = read_message(file, 0).end
        stop = read_message(file, start).end
    metadata_bytes = int.from_bytes(content[start + 4 : start + 8], "little")
    metadata = content[start + 8 : start + 8 + metadata_bytes]
    if field == "body":
        place = metadata.rindex(struct.pack("<q", stop - start - 8 - metadata_bytes))
    else:
        place = metadata.rindex(struct.pack("<qq", *list(_Table.root(metadata).table(2).structs(2, "<qq"))[-1]))
    place += start + 8
    path.write_bytes(content[:place] + struct.pack("<q", value) + content[place + 8 :])
    with open(path, "rb") as file, pytest.raises(MessageError):
        read_message(file, start)
