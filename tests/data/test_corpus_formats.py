"""The same documents come out of every format, and what is damaged or left out is named and counted."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import sys

import pytest

from data_tools.corpus import TextCorpus
from data_tools.unit_reader import Rules
from data_tools.units import UNIT_BYTES
from w1train.data.text.file_names import CorpusError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")

RECORDS = [
    {"text": f"document {i} caf\N{LATIN SMALL LETTER E WITH ACUTE}\r\n" * (i % 7 + 1), "meta": {"lang": "en" if i % 3 else "de"}, "n": i}
    for i in range(60)
]
TEXTS = [record["text"] for record in RECORDS]
SKIP = Rules(on_error="skip")


def jsonl(records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_arrow(path, table, opened):
    with pa.OSFile(str(path), "wb") as file, opened(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=13)


def write(directory, kind, records=RECORDS):
    """A corpus of one file (for "saved", a directory as Hugging Face's save_to_disk writes it)."""
    path, table = directory / f"x.{kind}", pa.Table.from_pylist(records)
    if kind == "saved":
        path.mkdir()
        write_arrow(path / "data-00000-of-00001.arrow", table, pa.ipc.new_stream)
        (path / "cache-1.arrow").write_bytes(b"left over")
        (path / "dataset_info.json").write_text("{}")
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    elif kind == "parquet":
        parquet.write_table(table, path, row_group_size=25)
    elif kind == "arrow":
        write_arrow(path, table, pa.ipc.new_file)
    else:
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "ndjson.zst": zstd.compress}[kind]
        path.write_bytes(pack(jsonl(records)))
    return path


def texts_of(path, rules=SKIP, **options):
    return [document.text for document in TextCorpus([path], rules, **options)]


KINDS = ["jsonl", "jsonl.gz", "ndjson.zst", "parquet", "arrow", "saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_documents(tmp_path, kind):
    path = write(tmp_path, kind)
    assert texts_of(path) == TEXTS
    rules = Rules(text_field="meta.lang", filters=(("n", "^[0-9]$"), ("meta.lang", "^en")))
    assert texts_of(path, rules) == ["en"] * 6
    corpus = TextCorpus([path], Rules(min_bytes=40, max_bytes=90))
    assert [document.text for document in corpus] == [text for text in TEXTS if 40 <= len(text.encode()) <= 90]
    assert corpus.log.counts.num_filtered == len(TEXTS) - corpus.log.counts.num_documents
    assert corpus.num_bytes_read == corpus.num_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_units_can_be_begun_at_each_of_them(tmp_path, kind, monkeypatch):
    """What a resumed run relies on."""
    monkeypatch.setattr("data_tools.units.UNIT_BYTES", 400)
    monkeypatch.setattr("w1train.data.text.decompress.CHUNK_BYTES", 150)
    corpus = TextCorpus([write(tmp_path, kind)])
    units = list(corpus.units())
    assert len(units) > 4
    for number, unit in enumerate(units):
        assert list(corpus.units(unit.start)) == units[number:]
    assert [document.text for unit in units for document in corpus.reader.read(unit).documents] == TEXTS
    assert all(before.num_bytes_done <= after.num_bytes_done for before, after in itertools.pairwise(units))


def test_text_files_are_grouped_and_may_be_compressed(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("x" * (UNIT_BYTES // 2))
    (tmp_path / "5.txt.gz").write_bytes(gzip.compress(b"compressed"))
    (tmp_path / "6.jsonl").write_bytes(jsonl(RECORDS[:2]))
    corpus = TextCorpus([tmp_path])
    units = list(corpus.units())
    assert [len(unit.paths) for unit in units] == [2, 2, 1, 1, 1]
    for number, unit in enumerate(units):
        assert list(corpus.units(unit.start)) == units[number:]
    assert [document.text for document in corpus][5:] == ["compressed", *TEXTS[:2]]
    assert "7 files (1 jsonl, 6 text)" in corpus.summary()


@pytest.mark.parametrize("kind", ["jsonl.gz", "ndjson.zst"])
def test_a_truncated_stream_gives_its_lines_and_one_bad_record(tmp_path, kind, caplog):
    path = write(tmp_path, kind, [{"text": f"{i * 7919 % 1000}" * 40} for i in range(4000)])
    path.write_bytes(path.read_bytes()[:-50])
    corpus = TextCorpus([path], SKIP)
    texts = [document.text for document in corpus]
    assert texts == [f"{i * 7919 % 1000}" * 40 for i in range(len(texts))]
    assert corpus.log.counts.num_bad == 1
    assert f"{path}:{len(texts) + 1}: the compressed file is damaged here" in caplog.text
    with pytest.raises(CorpusError, match="damaged here"):
        texts_of(path, Rules())


def test_bad_rows_are_named(tmp_path, caplog):
    column = pa.Array.from_buffers(pa.string(), 3, pa.array([b"good", b"caf\xe9", b"better"], pa.binary()).buffers())
    write_arrow(tmp_path / "x.arrow", pa.table({"text": column}), pa.ipc.new_stream)
    assert texts_of(tmp_path / "x.arrow") == ["good", "better"]
    assert "x.arrow:2: byte 3 (0xe9) is not UTF-8" in caplog.text
    path = write(tmp_path, "parquet", [{"text": "one"}, {"text": None}, {"text": "two"}])
    assert texts_of(path) == ["one", "two"]
    assert f"{path}:2: no record with a string 'text'" in caplog.text
    assert texts_of(write(tmp_path, "jsonl", [{"text": "x", "a.b": "whole name", "a": {"b": "nested"}}]), Rules("a.b")) == ["whole name"]


def test_missing_columns_are_listed(tmp_path):
    with pytest.raises(CorpusError, match=r"x\.parquet: has no column 'body'; its columns: text, meta, n"):
        texts_of(write(tmp_path, "parquet"), Rules("body"))


def test_saved_datasets_are_read_by_split(tmp_path):
    write(tmp_path, "saved")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["x.saved"]}')
    with pytest.raises(CorpusError, match=r"holds the splits x\.saved of a dataset: name the one"):
        TextCorpus([tmp_path])
    state = tmp_path / "x.saved" / "state.json"
    for content, message in [
        ("[", r"state\.json is no state of a Hugging Face dataset"),
        ("[" * 100 + "]" * 100, "nested deeper"),
        ('{"_data_files": 7}', "is not the state of"),
        ('{"_data_files": [1]}', "is not the state of"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', r"lacks 'gone\.arrow'"),
        ('{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}', "flatten_indices"),
    ]:
        state.write_text(content)
        with pytest.raises(CorpusError, match=message):
            TextCorpus([tmp_path / "x.saved"])
    with state.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorpusError, match="too large"):
        TextCorpus([tmp_path / "x.saved"])


@pytest.mark.parametrize(("kind", "library"), [("parquet", "pyarrow"), ("ndjson.zst", "zstd")])
def test_a_missing_library_is_named(tmp_path, kind, library, monkeypatch):
    path = write(tmp_path, kind)
    monkeypatch.setitem(sys.modules, "pyarrow" if library == "pyarrow" else zstd.__name__, None)
    with pytest.raises(CorpusError, match=rf"{library}.*pip install 'w1train\[data\]'"):
        texts_of(path)


def test_formats_can_be_said_and_text_has_no_fields(tmp_path):
    path = tmp_path / "x.data"
    path.write_bytes(jsonl(RECORDS))
    assert texts_of(path, kind="jsonl") == TEXTS
    with pytest.raises(CorpusError, match=r"x\.data is a text file, which has no fields to filter by"):
        TextCorpus([path], Rules(filters=(("n", "1"),)))
    with pytest.raises(CorpusError, match=r"cannot filter n by '\(': it is not a regular expression"):
        TextCorpus([path], Rules(filters=(("n", "("),)), kind="jsonl")
