"""A field that a file does not have is an error or counted, in every format alike, and never a file of no rows."""

from __future__ import annotations

import json
import re

import pytest

from data_tools.corpus import TextCorpus
from data_tools.fields import look_up, schema_fault
from data_tools.unit_reader import Rules
from w1train.data.text.file_names import CorpusError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

GOOD = [{"doc": {"text": f"good {i}", "lang": "en"}, "tags": None} for i in range(3)]
BAD = [{"doc": {"body": f"bad {i}", "lang": "en"}, "tags": None} for i in range(5)]
CHAT = [{"messages": [{"role": "user", "content": "hello"}], "n": 1}] * 2


def write(directory, name, kind, records):
    path, table = directory / f"{name}.{kind}", pa.Table.from_pylist(records)
    if kind in ("jsonl", "json"):
        lines = map(json.dumps, records)
        path.write_text("\n".join(lines) if kind == "jsonl" else f"[{', '.join(lines)}]")
    elif kind == "parquet":
        parquet.write_table(table, path, row_group_size=2)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


KINDS = ["jsonl", "json", "parquet", "arrow"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_field", "filters"), [("doc.text", ()), ("doc.lang", (("doc.text", "good"),))], ids=["the text", "a filter"])
def test_a_file_without_a_field_is_no_file_without_rows(tmp_path, caplog, kind, text_field, filters):
    write(tmp_path, "a", kind, BAD)
    write(tmp_path, "b", kind, GOOD)
    with pytest.raises(CorpusError, match=rf"a\.{kind}.*'doc\.text'.*body, lang"):
        list(TextCorpus([tmp_path], Rules(text_field, filters=filters)))
    corpus = TextCorpus([tmp_path], Rules(text_field, filters=filters, on_error="skip"))
    assert len(list(corpus)) == len(GOOD)
    assert corpus.log.counts.num_bad == len(BAD)
    assert "'doc.text'" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_null_is_there(tmp_path, kind):
    """An optional field, or object, matches filters as an empty text."""
    path = write(tmp_path, "a", kind, [{"text": "a", "meta": None, "n": 1}, {"text": "b", "meta": {"lang": "en"}, "n": None}])
    assert [document.text for document in TextCorpus([path], Rules(filters=(("meta.lang", "^$"),)))] == ["a"]
    assert [document.text for document in TextCorpus([path], Rules(filters=(("n", "^$"),)))] == ["b"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_said_to_be_a_list(tmp_path, kind):
    path = write(tmp_path, "chat", kind, CHAT)
    with pytest.raises(CorpusError, match=r"'messages' is .*list.*content.*join the texts of each"):
        list(TextCorpus([path], Rules("messages.content")))
    corpus = TextCorpus([path], Rules("messages.content", on_error="skip"))
    with pytest.raises(CorpusError, match=r"the corpus is empty: .* 2 not text"):
        list(corpus)


@pytest.mark.parametrize(
    ("kind", "field", "fault"),
    [
        (pa.int64(), "x", r"has no text in 'x': 'x' is int64; its columns of text: t"),
        (pa.list_(pa.string()), "x", r"'x' is list<.*string>\. A document is one text"),
        (pa.map_(pa.string(), pa.string()), "x.k", r"has no field 'x\.k': 'x' is map<string, string"),
        (pa.struct([("a", pa.string())]), "x", r"has no text in 'x': 'x' is struct<a: string>"),
        (pa.struct([("a", pa.struct([("b", pa.int8())]))]), "x.a.c", r"'x\.a' is struct<b: int8>, with the fields b"),
        (pa.string(), "x.a", r"has no field 'x\.a': 'x' is string"),
        (pa.string(), "y", r"has no column 'y'; its columns: x, t"),
        (pa.dictionary(pa.int32(), pa.string()), "x", ""),
        (pa.large_binary(), "x", ""),
        (pa.string_view(), "x", ""),
        (pa.struct([("a", pa.large_string())]), "x.a", ""),
    ],
    ids=str,
)
def test_schemas(kind, field, fault):
    found = schema_fault(pa.schema([("x", kind), ("t", pa.string())]), [field])
    assert re.search(fault, found) if fault else not found


def test_whole_names_come_before_parts():
    assert schema_fault(pa.schema([("a.b", pa.string())]), ["a.b"]) == ""
    assert look_up({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    with pytest.raises(CorpusError, match="its 'a' has the fields c"):
        look_up({"a": {"c": 2}}, "a.b")
