"""What is JSON by its name or its content is read as JSON or refused, whatever its layout, its compression and its other fields are."""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
import os
import sys
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.corpus import TextCorpus
from data_tools.corpus_files import Limits
from data_tools.unit_reader import Rules
from w1train.data.text import decompress
from w1train.data.text.decompress import ContentReader, DamagedError, WindowError
from w1train.data.text.file_names import CorpusError, kind_of
from w1train.data.text.json_records import RecordReader
from w1train.evaluation.questions import read_questions

zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")

RECORDS = [{"text": f'document {i}\n[x], {{y}}, "z\\', "n": [i, {"m": "]"}]} for i in range(9)]
TEXTS = [record["text"] for record in RECORDS]
MARK = "\ufeff"
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY, INDENTED = json.dumps(RECORDS).encode(), json.dumps(RECORDS, indent=2).encode() + b"\n\n"
OBJECTS = "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode()


def texts_of(path, **options):
    return [document.text for document in TextCorpus([path], Rules(**options))]


@pytest.mark.parametrize("layout", [LINES, ARRAY, INDENTED, OBJECTS, MARK.encode() + ARRAY, b" \n" + INDENTED], ids=range(6))
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".XZ", ".bz2"])
def test_json_is_read_in_every_layout(tmp_path, layout, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress, ".XZ": lzma.compress, ".bz2": bz2.compress}[suffix]
    path = tmp_path / f"x.json{suffix}"
    path.write_bytes(pack(layout))
    assert texts_of(path) == TEXTS


@pytest.mark.parametrize("name", ["x.JSONL", "x.jsonlines", "x.ndjson", "x.Jsonl.GZ", "x.jsonl.xz"])
def test_names_that_mean_lines(name):
    assert kind_of(name) == "jsonl"


json_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
)


@settings(max_examples=60)
@given(
    values=st.lists(json_values, min_size=1, max_size=6),
    indent=st.none() | st.integers(0, 2),
    size=st.integers(1, 30),
    escapes=st.booleans(),
    mark=st.sampled_from(["", MARK]),
)
def test_an_array_is_folded_to_lines_of_the_same_length(values, indent, size, escapes, mark):
    """In chunks of any size, and from every line on, and from the end on."""
    content = mark.encode() + json.dumps(values, indent=indent, ensure_ascii=escapes).encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompress, "CHUNK_BYTES", max(size, len(mark.encode())))
        path = os.path.join(directory, "x.json")
        with open(path, "wb") as file:
            file.write(content)

        def read(offset: int) -> bytes:
            with RecordReader(path, "json") as reader:
                return b"".join(reader.chunks(offset))

        folded = read(0)
        assert len(folded) == len(content)
        assert [json.loads(line) for line in folded.removeprefix(mark.encode()).split(b"\n")] == values
        starts = [place + 1 for place, byte in enumerate(folded) if byte == ord("\n")]
        assert all(read(start) == folded[start:] for start in [*starts, len(folded)])


@pytest.mark.parametrize(
    ("content", "texts", "num_bad"),
    [
        (b'[{"text": "a"}, {"text": "b"}', ["a"], 1),
        (b'[{"text": "a"}, {"text": "b', ["a"], 1),
        (b'[{"text": "a"},\n3,\n["text"]]', ["a"], 2),
        (b'[{"text": "a\nb"}, {"text": "c"}]', ["c"], 1),
        (b'[{"text": "a"}]\n[{"text": "b"}]', ["a", "b"], 0),
        (b"[]\n", [], 0),
        (b'[{"text": "a"}]\n[ ]\n[{"text": "b"}]', ["a", "b"], 0),
        (b'[{"text": "a"}, \n ,,{"text": "b"},\n]\n', ["a", "b"], 2),
        (b'[{"text": "a"},,{"text": "b"}, {"text": "c"}]', ["a", "c"], 1),
        (b'[,{"text": "a"}, {"text": "b"}]', ["b"], 1),
        (b'{"text": "a"}\n{"text": "b"\n{"text": "c"}', ["a", "c"], 1),
        (b'{"data": [\n{"text": "a"}\n]}', [], 1),
        ('[{"text": "a"}]'.encode("utf-16"), [], 1),
    ],
)
def test_bad_json_is_counted(tmp_path, content, texts, num_bad):
    (tmp_path / "x.json").write_bytes(content)
    (tmp_path / "y.jsonl").write_text('{"text": "good"}')
    corpus = TextCorpus([tmp_path], Rules(on_error="skip"))
    assert [document.text for document in corpus] == [*texts, "good"]
    assert corpus.log.counts.num_bad == num_bad


@pytest.mark.parametrize("content", [b'[{"text": "a"},\n', b'[{"text": "a"}, {"text": "b"}'], ids=range(2))
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_array_without_an_end_is_found_behind_its_last_line_too(tmp_path, content, suffix):
    path = tmp_path / f"x.json{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with RecordReader(str(path), "json") as reader, pytest.raises(DamagedError, match="the JSON array has no end"):
        list(reader.chunks(len(content)))


def test_a_resumed_array_is_read_as_a_whole_one(tmp_path):
    """Also behind the bracket of a further array, and behind a comma that no element follows."""
    path = tmp_path / "x.json"
    for content in (b'[{"text": "a"}][]', b'[{"text": "a"},][ ] [{"text": "b"}]', b'[{"text": "a"}]\n[\n]\n[,]'):
        path.write_bytes(content)
        with RecordReader(str(path), "json") as reader:
            folded = b"".join(reader.chunks())
            for start in (place + 1 for place, byte in enumerate(folded) if byte == ord("\n")):
                assert b"".join(reader.chunks(start)) == folded[start:]


def test_a_comma_before_the_end_of_an_array_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'[{"text": "a"},\n{"text": "b"},\n]\n')
    with pytest.raises(CorpusError, match=r"x\.json:3: not JSON"):
        texts_of(path)
    assert texts_of(path, on_error="skip") == ["a", "b"]


def test_a_mark_before_an_array_is_no_document(tmp_path):
    """Also if it is a compressed member of its own."""
    (tmp_path / "x.json").write_text(MARK + json.dumps(RECORDS))
    (tmp_path / "y.json.gz").write_bytes(gzip.compress(MARK.encode()) + gzip.compress(INDENTED))
    corpus = TextCorpus([tmp_path])
    assert [document.text for document in corpus] == TEXTS * 2
    assert corpus.log.counts.num_empty == 0
    questions = [{"prompt": prompt, "completion": "c"} for prompt in "ab"]
    (tmp_path / "q.json").write_text(MARK + json.dumps(questions))
    assert [(question.line, question.prompt) for question in read_questions(tmp_path / "q.json")] == [(1, "a"), (2, "b")]


@pytest.mark.parametrize("content", [LINES, ARRAY, INDENTED, OBJECTS, MARK.encode() + LINES], ids=range(5))
def test_json_under_another_name_is_refused(tmp_path, content):
    path = tmp_path / "x.part"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"x\.part: it begins with a JSON object: give --format json or jsonl, or --format text"):
        texts_of(path)
    assert [document.text for document in TextCorpus([path], kind="json")] == TEXTS
    assert len(list(TextCorpus([path], kind="text"))) == 1


@pytest.mark.parametrize("name", ["part-00000", "x.jl", "data.jsonl.1", "data.jsonl-00000-of-00001", "x.geojson"])
def test_json_under_any_other_name_is_refused(tmp_path, name):
    (tmp_path / name).write_text('{"content": "a"}\n{"content": "b"}')
    with pytest.raises(CorpusError, match=f"{name}: it begins with a JSON object"):
        texts_of(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        '{"meta": 1}\n{"text": "a"}',
        '{"text": null}\n',
        '{"text": ["a", "b"]}',
        '{"data": [{"text": "a"}]}',
        '[\n {"a": 1},\n 3]',
        '{}\n{"text": "a"}',
        '[{}, {"text": "a"}]',
        f'{{"x": {"[" * 30000}1{"]" * 30000}}}',
        '{"other": 1}\n{ a brace begins this text }',
    ],
    ids=range(9),
)
def test_json_with_any_keys_is_refused_under_another_name(tmp_path, content):
    path = tmp_path / "part-00000"
    path.write_text(content)
    with pytest.raises(CorpusError, match="it begins with a JSON object: give --format json or jsonl, or --format text"):
        texts_of(path)
    assert [document.text for document in TextCorpus([path], kind="text")] == [content]


@pytest.mark.parametrize(
    ("content", "is_refused"),
    [
        ('ext": "cut"}\n{"text": "a"}\n\n{"te', True),
        ('# a heading\r\n{"text": "a"}\r\n{"text": "b"}\r\n', True),
        ('null\n{"text": "a"}\n{"text": "b"}', True),
        ('Answer in JSON:\n{"text": "a"}\n', False),
        ('Two examples:\n{"text": "a"}\n{"text": "b"}\nThese were the examples.', False),
        ("\n{\n    int i = 0;\n}\n", False),
    ],
    ids=range(6),
)
def test_a_part_of_a_file_of_lines_is_refused(tmp_path, content, is_refused):
    """As ``split -b`` makes it, whose parts but the first begin in the middle of a line."""
    path = tmp_path / "xab"
    path.write_text(content)
    if is_refused:
        with pytest.raises(CorpusError, match="xab: its lines from the second on are JSON objects: give --format jsonl, or --format text"):
            texts_of(path)
    corpus = TextCorpus([path], kind="text" if is_refused else None)
    assert [document.text for document in corpus] == [path.read_bytes().decode()]


@pytest.mark.parametrize(
    "content",
    [
        "{'name': 'sale', 'depends': ['base']}\n",
        '{"name": "sale", "installable": True}\n',
        '{"a": 1, **defaults}',
        '{ a brace begins this text }\n{"text": "a"}',
        "{\n    int i = 0;\n    return i;\n}\n",
        '{{ config(materialized="table") }}\nselect 1',
        '{% extends "base.html" %}',
        "{} is the empty set, and {1} is not.",
        '[1] Smith, "A text", 1999. {"a": 1}',
        '[{"a": 1',
        '["a", "b"]',
        '"a": {"b": 1}',
        "{" * 30000,
    ],
    ids=range(13),
)
def test_texts_that_begin_with_a_brace_are_texts(tmp_path, content):
    (tmp_path / "part-00000").write_text(content)
    assert texts_of(tmp_path / "part-00000") == [content]


def test_nesting_is_named_as_the_fault(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "keep me", "x": {"[" * 30000}{"]" * 30000}}}\n{{"text": "a"}}\n')
    with pytest.raises(CorpusError, match=r"x\.jsonl:1: the lists and objects are nested too deeply to be read"):
        texts_of(path)
    assert texts_of(path, on_error="skip") == ["a"]


def test_the_layout_is_found_in_small_pieces(tmp_path):
    """Of a compressed file, whose first pieces may hold a brace or a line."""
    path = tmp_path / "x.json.gz"
    for content in (OBJECTS, INDENTED, LINES, MARK.encode() + OBJECTS, b" \n" * 9 + OBJECTS):
        pieces = [content[i : i + 1] for i in range(60)] + [content[60:]]
        path.write_bytes(b"".join(map(gzip.compress, pieces)))
        assert texts_of(path) == TEXTS
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(os.urandom(999))[:500])
    assert texts_of(tmp_path, on_error="skip") == ["a"]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_a_compressed_file_of_no_bytes_is_damaged(tmp_path, suffix):
    for name in (f"x.jsonl{suffix}", f"x.json{suffix}", f"x.txt{suffix}"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(CorpusError, match="the compressed file is damaged: it has 0 bytes"):
            texts_of(tmp_path / name)


def test_zeros_between_streams_of_xz_are_padding(tmp_path):
    path = tmp_path / "x.txt.xz"
    path.write_bytes(lzma.compress(b"a ") + bytes(20004) + lzma.compress(b"text") + bytes(8))
    assert texts_of(path) == ["a text"]


def test_a_dictionary_of_zstandard_is_asked_for(tmp_path):
    path = tmp_path / "x.txt.zst"
    path.write_bytes(zstd.compress(LINES, zstd_dict=zstd.train_dict([LINES[i : i + 40] for i in range(400)], 1024)))
    with pytest.raises(CorpusError, match="needs the dictionary with which the file was compressed"):
        texts_of(path)


@pytest.mark.parametrize("name", ["x.jsonl.lz4", "x.zip", "x.tar.gz", "x.7Z"])
def test_archives_are_no_text(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"text") if name.endswith("gz") else b"text")
    with pytest.raises(CorpusError, match=r"cannot be read: unpack it, or compress its files as \.gz, \.zst, \.zstd, \.xz, \.bz2"):
        texts_of(tmp_path / name)


@pytest.mark.parametrize("name", ["x.parquet.gz", "x.arrow.ZST"])
def test_tables_are_not_decompressed(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"a table"))
    with pytest.raises(CorpusError, match=r"it is a table that is compressed by (gzip|zstd) as a whole; decompress it first"):
        texts_of(tmp_path / name)


def test_a_mark_at_the_start_is_dropped_alike(tmp_path):
    """Of a text file, of each line, of each text, and of each cell; it is dropped once."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"{MARK}a", f"{MARK}{MARK}b", f"c{MARK}"]
    records = [{"text": text} for text in texts]
    (tmp_path / "1.jsonl").write_text("".join(f"{MARK}{json.dumps(record, ensure_ascii=False)}\n" for record in records))
    (tmp_path / "2.json").write_text(MARK + json.dumps(records))
    parquet.write_table(pa.table({"text": texts}), tmp_path / "3.parquet")
    parquet.write_table(pa.table({"text": [text.encode() for text in texts]}), tmp_path / "4.parquet")
    for number, text in enumerate(texts):
        (tmp_path / f"5{number}.txt").write_text(text)
    assert texts_of(tmp_path) == ["a", f"{MARK}b", f"c{MARK}"] * 5


def test_a_number_that_python_does_not_convert_costs_no_document(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "a", "n": {"7" * 5000}}}\n{{"text": "b", "n": [1, -{"3" * 5000}]}}\n{{"text": {"1" * 5000}}}\n')
    corpus = TextCorpus([path], Rules(on_error="skip"))
    assert [document.text for document in corpus] == ["a", "b"]
    assert corpus.log.counts.num_bad == 1
    assert texts_of(path, filters=(("n", "^7{5000}$"),), on_error="skip") == ["a"]


def streamed(content: bytes) -> bytes:
    """A frame that does not say its length, and therefore needs all of its window of 1 GiB."""
    options = {zstd.CompressionParameter.window_log: 30, zstd.CompressionParameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_long_windows_are_decoded_up_to_the_limit(tmp_path, caplog, suffix):
    path = tmp_path / f"x.{suffix}.zst"
    path.write_bytes(streamed(LINES if suffix == "jsonl" else b"a text"))
    assert texts_of(path) == (TEXTS if suffix == "jsonl" else ["a text"])
    with ContentReader(str(path), 1 << 29) as reader, pytest.raises(WindowError, match="more memory than the limit of 512 MiB"):
        list(reader.chunks())
    (tmp_path / "y.txt").write_text("good")
    rules = Rules(limits=Limits(row_group=1 << 29), on_error="skip")
    corpus = TextCorpus([tmp_path], rules)
    assert [document.text for document in corpus] == ["good"]
    assert (corpus.log.counts.num_too_large, corpus.log.counts.num_bad) == (1, 0)
    assert "--max-row-group-size" in caplog.text
    assert "damaged" not in caplog.text


def test_the_dictionary_of_xz_has_the_limit(tmp_path):
    path = tmp_path / "x.txt.xz"
    path.write_bytes(lzma.compress(b"a text", filters=[{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 200 << 20}]))
    assert texts_of(path) == ["a text"]
    with ContentReader(str(path), 1) as reader, pytest.raises(WindowError, match="the limit of 128 MiB"):
        list(reader.chunks())
