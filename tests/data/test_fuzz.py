"""Bad input, 300 kinds of it: a clear error or a counted skip, never a crash, a hang or a dataset that is not whole."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import inspect, tokenize
from tests.slow import examples
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.indexed import read_index, write_index

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")

RECORDS = [{"text": f"document {i} \N{SNOWMAN}", "n": i} for i in range(30)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
INDEX_LENGTHS = np.array([3, 1, 4, 1, 5], dtype=np.int32)


def table_bytes(kind: str) -> bytes:
    table, sink = pa.Table.from_pylist(RECORDS), io.BytesIO()
    if kind == "parquet":
        parquet.write_table(table, sink, row_group_size=10)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    return sink.getvalue()


def index_bytes() -> bytes:
    sink = io.BytesIO()
    write_index(sink, np.dtype("uint16"), INDEX_LENGTHS)
    return sink.getvalue()


GOOD = {
    "x.txt": LINES,
    "x.jsonl": LINES,
    "x.jsonl.gz": gzip.compress(LINES, mtime=0),
    "x.jsonl.zst": zstd.compress(LINES),
    "x.txt.gz": gzip.compress(LINES, mtime=0),
    "x.parquet": table_bytes("parquet"),
    "stream.arrow": table_bytes("stream"),
    "file.arrow": table_bytes("file"),
}


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes replaced, put in, cut out or cut off."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(result) - 1, 0)))
        kind = draw(st.sampled_from(["replace", "insert", "remove", "truncate"]))
        if kind == "truncate":
            del result[place:]
        elif kind == "remove":
            del result[place : place + draw(st.integers(1, 8))]
        else:
            new = draw(st.binary(min_size=1, max_size=4))
            result[place : place + (len(new) if kind == "replace" else 0)] = new
    return bytes(result)


json_values = st.recursive(
    st.none() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
json_lines = st.lists(json_values | st.fixed_dictionaries({"text": json_values}), max_size=6).map(
    lambda records: "\n".join(map(json.dumps, records)).encode()
)
bad_files = st.sampled_from(sorted(GOOD)).flatmap(
    lambda name: st.tuples(st.just(name), st.one_of(damaged(GOOD[name]), damaged(GOOD[name]), st.binary(max_size=200), json_lines))
)


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """Nothing here survives a power cut, and runs of five flushes each would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@settings(max_examples=examples(40))
@given(bad=st.lists(bad_files, min_size=5, max_size=5), on_error=st.sampled_from(["skip", "skip", "skip", "fail"]))
def test_bad_corpora(tokenizer, bad, on_error):
    """Five at a time."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "in").mkdir()
        for number, (name, content) in enumerate(bad):
            Path(directory, "in", f"{number}{name}").write_bytes(content)
        Path(directory, "in", "good.jsonl").write_bytes(LINES)
        tokenizer.save(Path(directory, "tokenizer.json"))
        prefix = Path(directory, "out", "x")
        arguments = ["--input", f"{directory}/in", "--tokenizer", f"{directory}/tokenizer.json", "--output", str(prefix)]
        status = tokenize.main([*arguments, "--on-error", on_error])
        left = sorted(path.name for path in prefix.parent.iterdir())
        if status == 0:
            assert left == ["x.bin", "x.idx", "x.json"]
            assert inspect.main([str(prefix), "--tokenizer", f"{directory}/tokenizer.json"]) == 0
            counts = TokenDataset.open(prefix).manifest.corpus
            assert counts["num_documents"] >= len(RECORDS)
            assert on_error == "skip" or counts["num_bad"] == 0
        else:
            assert (status, on_error, left) == (1, "fail", [])


@settings(max_examples=examples(100))
@given(content=damaged(index_bytes()) | st.binary(max_size=100))
def test_bad_indices(content):
    """Refused, or an index of which every document can be read."""
    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory, "x")
        Path(directory, "x.idx").write_bytes(content)
        Path(directory, "x.bin").write_bytes(bytes(2 * int(INDEX_LENGTHS.sum())))
        try:
            index = read_index(prefix.with_suffix(".idx"))
            dataset = TokenDataset.open(prefix)
        except DatasetError:
            return
        assert dataset.num_documents == index.num_documents
        assert sum(len(dataset.document_tokens(i)) for i in range(dataset.num_documents)) == dataset.num_tokens
