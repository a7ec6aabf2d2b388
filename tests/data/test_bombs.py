"""Small files that become large ones: memory stays within the limits, and what is over a limit is an error or a counted skip."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import io
import json
import logging
import lzma
import multiprocessing
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import encode, lines, tokenize, units
from data_tools.corpus import TextCorpus
from data_tools.corpus_files import Limits
from data_tools.unit_reader import Rules
from tests.slow import examples
from w1train.data.text import decompress
from w1train.data.text.decompress import ContentReader, DamagedError, WindowError
from w1train.data.text.file_names import CorpusError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")

PACK = {"gz": gzip.compress, "zst": zstd.compress, "xz": lzma.compress, "bz2": bz2.compress}
MEGABYTE = 1 << 20
NUM_MEGABYTES = 96
MOST_GROWTH = 48 * MEGABYTE
"""With documents of at most 1 MiB and row groups of at most 8 MiB; half of it is what any run of the command takes. A bomb has more."""


def repeated(pack, num_megabytes=NUM_MEGABYTES) -> bytes:
    return pack(b"a" * MEGABYTE) * num_megabytes


def text_bomb(path, pack):
    path.write_bytes(pack(b"") * 1000 + repeated(pack))


def jsonl_bomb(path, pack):
    path.write_bytes(pack(b'{"text": "one"}\n{"text": "') + repeated(pack) + pack(b'"}\n{"text": "two"}'))


def table(*texts):
    return pa.table({"text": pa.array(["one", *texts, "two"])})


def dictionary_bomb(path):
    """Cells over the limit on documents, of which Parquet stores one."""
    parquet.write_table(table(*["a" * 2 * MEGABYTE] * 3), path, compression="zstd")


def pages_bomb(path):
    """One row group that says what it decodes to, and a small one."""
    with parquet.ParquetWriter(path, table().schema, compression="zstd", use_dictionary=False) as writer:
        writer.write_table(table())
        writer.write_table(pa.table({"text": ["a" * MEGABYTE] * NUM_MEGABYTES}))
        writer.write_table(table())


def lying_bomb(path):
    """The same, but the footer says that it decodes to a fraction."""
    pages_bomb(path)
    group = parquet.read_metadata(path).row_group(1)
    content = path.read_bytes()
    for number in {group.total_byte_size, group.column(0).total_uncompressed_size}:
        assert varint(number) in content
        content = content.replace(varint(number), varint(1 << 21))
    path.write_bytes(content)
    assert parquet.read_metadata(path).row_group(1).column(0).total_uncompressed_size == 1 << 21


def varint(number: int) -> bytes:
    """As Thrift writes it, of five bytes whatever the number."""
    number *= 2
    return bytes((number >> 7 * i & 127) | (128 if number >> 7 * (i + 1) else 0) for i in range(4))


def beginnings_bomb(path):
    """Values that Parquet stores as the beginning of the one before."""
    encoding = {"text": "DELTA_BYTE_ARRAY"}
    parquet.write_table(table(*["a" * 2 * MEGABYTE] * NUM_MEGABYTES), path, use_dictionary=False, column_encoding=encoding)


def write_arrow(path, opened, *tables):
    with opened(path, tables[0].schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for each in tables:
            writer.write_table(each)


def buffers_bomb(path, opened):
    write_arrow(path, opened, table(), pa.table({"text": ["a" * MEGABYTE] * NUM_MEGABYTES}), table())


def views_bomb(path):
    """Many cells over the limit that refer to the same bytes."""
    text = table(*["a" * 2 * MEGABYTE]).column(0).dictionary_encode().combine_chunks()
    indices = pa.array([0, *[1] * NUM_MEGABYTES, 2], pa.int32())
    write_arrow(path, pa.ipc.new_stream, pa.table({"text": pa.DictionaryArray.from_arrays(indices, text.dictionary)}))


BOMBS = {
    "x.txt.gz": (lambda path: text_bomb(path, gzip.compress), 0, 1),
    "x.txt.zst": (lambda path: text_bomb(path, zstd.compress), 0, 1),
    "x.txt.xz": (lambda path: text_bomb(path, lzma.compress), 0, 1),
    "x.jsonl.bz2": (lambda path: jsonl_bomb(path, bz2.compress), 2, 1),
    "x.jsonl.gz": (lambda path: jsonl_bomb(path, gzip.compress), 2, 1),
    "x.jsonl.zst": (lambda path: jsonl_bomb(path, zstd.compress), 2, 1),
    "dictionary.parquet": (dictionary_bomb, 2, 3),
    "pages.parquet": (pages_bomb, 4, NUM_MEGABYTES),
    "lying.parquet": (lying_bomb, 4, NUM_MEGABYTES),
    "beginnings.parquet": (beginnings_bomb, 1, NUM_MEGABYTES + 1),
    "file.arrow": (lambda path: buffers_bomb(path, pa.ipc.new_file), 4, NUM_MEGABYTES),
    "stream.arrow": (lambda path: buffers_bomb(path, pa.ipc.new_stream), 4, NUM_MEGABYTES),
    "views.arrow": (views_bomb, 0, NUM_MEGABYTES + 2),
}


def in_child(function):
    """(what a function returns, by how many bytes the memory grew) in a forked process."""

    def run(sender):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = status("VmHWM")
        sender.send((function(), status("VmHWM") - before))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(sender,))
    process.start()
    sender.close()
    try:
        assert receiver.poll(120), "the child takes too long"
        return receiver.recv()
    finally:
        process.kill()
        process.join()


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    return path


def run_tokenize(path, tokenizer_file, output, mode, num_workers):
    """(exit status, log, counts)."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    logging.getLogger("data_tools").setLevel(logging.INFO)
    limits = ["--max-document-size", "1M", "--max-row-group-size", "8M"]
    command = ["--input", str(path), "--tokenizer", str(tokenizer_file), "--output", str(output), "--on-error", mode, *limits]
    exit_status = tokenize.main([*command, "--workers", str(num_workers), "--overwrite"])
    logging.getLogger().removeHandler(handler)
    manifest = output.with_suffix(".json")
    corpus = json.loads(manifest.read_bytes())["corpus"] if exit_status == 0 else {}
    return exit_status, log.getvalue(), {name: corpus.get(f"num_{name}") for name in ("documents", "too_large", "bad")}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_an_error_or_a_counted_skip(name, tmp_path, tokenizer_file):
    write, num_documents, num_too_large = BOMBS[name]
    path = tmp_path / "in" / name
    path.parent.mkdir()
    write(path)
    assert path.stat().st_size < 2_500_000
    if num_documents == 0:  # the command wants a document
        (path.parent / "y.txt").write_text("text")

    def run():
        arguments = path.parent, tokenizer_file, tmp_path / "out"
        failed = run_tokenize(*arguments, "fail", 2)
        return failed, run_tokenize(*arguments, "skip", 1), run_tokenize(*arguments, "skip", 2)

    (failed, one, two), growth = in_child(run)
    assert failed[0] == 1
    assert path.name in failed[1]
    assert "limit of" in failed[1]
    assert "--max-" in failed[1]
    assert "--on-error skip" in failed[1]
    assert one[0] == two[0] == 0
    assert one[2] == two[2]
    assert one[2] == {"documents": max(num_documents, 1), "too_large": num_too_large, "bad": 0}
    assert f"left out {one[2]['too_large']} files, lines or rows over --max-document-size" in one[1]
    assert growth < MOST_GROWTH, f"{growth / MEGABYTE:.0f} MiB"


def limited(document, row_group=1 << 40, on_error="skip", **rules):
    return Rules(limits=Limits(document, row_group), on_error=on_error, **rules)


def write_texts(directory, kind, texts):
    """A corpus of texts, and the number of bytes by which each is judged."""
    path = directory / f"x.{kind}"
    sizes = [len(text.encode()) for text in texts]
    if kind == "txt" or kind.startswith("txt."):
        path.mkdir()
        for i, text in enumerate(texts):
            pack = PACK.get(kind.partition(".")[2], bytes)
            (path / f"{i:03d}.{kind}").write_bytes(pack(text.encode()))
    elif kind.startswith("jsonl"):
        records = [json.dumps({"text": text}) for text in texts]
        path.write_bytes(PACK.get(kind.partition(".")[2], bytes)("".join(record + "\n" for record in records).encode()))
        sizes = [len(record) for record in records]
    elif kind == "parquet":
        parquet.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=7)
    else:
        with pa.ipc.new_stream(path, pa.schema({"text": pa.string()})) as writer:
            writer.write_table(pa.table({"text": pa.array(texts, pa.string())}), max_chunksize=5)
    return path, sizes


KINDS = ["txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_at_the_limit_is_read_and_one_byte_more_is_not(kind, tmp_path):
    text = "caf\N{LATIN SMALL LETTER E WITH ACUTE} " * 30_000
    path, (size,) = write_texts(tmp_path, kind, [text])
    assert [document.text for document in TextCorpus([path], limited(size, on_error="fail"))] == [text]
    with pytest.raises(CorpusError, match=rf"limit of {size - 1}\b.*\(--max-document-size\)"):
        list(TextCorpus([path], limited(size - 1, on_error="fail")))
    corpus = TextCorpus([path], limited(size - 1))
    with pytest.raises(CorpusError, match="1 over a limit"):
        list(corpus)
    assert (corpus.log.counts.num_too_large, corpus.log.counts.num_bad) == (1, 0)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + b"a" * 100)
    assert len(list(TextCorpus([tmp_path], limited(100, on_error="fail")))) == 1
    with pytest.raises(CorpusError, match="over the limit of 99"):
        list(TextCorpus([tmp_path], limited(99, on_error="fail")))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(data=st.data())
def test_what_is_read_and_what_is_skipped_is_all_there_is(kind, data):
    some = st.text(min_size=1).filter(str.strip) | st.integers(1, 300).map("a".__mul__)
    texts = [*data.draw(st.lists(some, max_size=12)), "end"]
    limit = data.draw(st.integers(20, 200))
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", data.draw(st.sampled_from([50, 400])))
        patch.setattr(decompress, "CHUNK_BYTES", data.draw(st.sampled_from([1, 7, 64])))
        patch.setattr(decompress, "_INPUT_BYTES", data.draw(st.sampled_from([5, 1000])))
        path, sizes = write_texts(Path(directory), kind, texts)
        corpus = TextCorpus([path], limited(limit))
        read = [document.text for document in corpus]
        whole = [unit for unit in corpus.units() if unit.end != unit.start]
        for number, unit in enumerate(whole):  # what a resumed run relies on
            rest = [each for each in corpus.units(unit.start) if each.end != each.start]
            assert [(each.start, each.end, each.content, each.fault) for each in rest] == [
                (each.start, each.end, each.content, each.fault) for each in whole[number:]
            ]
    assert read == [text for text, size in zip(texts, sizes, strict=True) if size <= limit]
    assert corpus.log.counts.num_documents + corpus.log.counts.num_too_large == len(texts)


def test_an_interrupted_run_goes_on_behind_what_it_skipped(tmp_path, tokenizer_file, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 200)
    monkeypatch.setattr(decompress, "CHUNK_BYTES", 64)
    texts = [f"document {i} " * (i % 40 + 1) for i in range(40)]
    for kind in ("jsonl.gz", "parquet"):
        write_texts(tmp_path, kind, texts)
    command = ["--tokenizer", str(tokenizer_file), "--record-seconds", "0", "--on-error", "skip", "--max-document-size", "300"]
    command += ["--workers", "1", "--input", *(str(tmp_path / f"x.{kind}") for kind in ("jsonl.gz", "parquet"))]
    assert tokenize.main([*command, "--output", str(tmp_path / "whole")]) == 0
    write_record = tokenize.Outputs.write_record
    left = [0]

    def interrupted(*arguments, **options):
        write_record(*arguments, **options)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenize.Outputs, "write_record", interrupted)
    num_runs = 0
    while not (tmp_path / "parts.json").exists():
        left[0] = 20
        tokenize.main([*command, "--output", str(tmp_path / "parts")])
        num_runs += 1
        assert num_runs < 50
    assert num_runs > 2
    for ending in ("bin", "idx", "json"):
        assert (tmp_path / f"parts.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    assert json.loads((tmp_path / "whole.json").read_bytes())["corpus"]["num_too_large"] > 10


def test_a_text_that_is_split_is_judged_piece_by_piece(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("= one =\n" + "= " + "a" * 40 + " =\n= two =\n", encoding="utf-8")
    corpus = TextCorpus([path], Rules(split_on="^= ", on_error="skip", limits=Limits(document=20, row_group=100)))
    assert [document.text.strip() for document in corpus] == ["= one =", "= two ="]
    assert (corpus.log.counts.num_documents, corpus.log.counts.num_too_large) == (2, 1)
    with pytest.raises(CorpusError, match=r"x.txt: the file has 61 bytes, over the limit of 60 \(--max-row-group-size\)"):
        list(TextCorpus([path], Rules(split_on="^= ", limits=Limits(document=50, row_group=60))))


def test_pieces_of_a_text_go_to_the_library_a_few_at_a_time(tmp_path, tokenizer, tokenizer_file, monkeypatch):
    (tmp_path / "x.txt").write_text("".join(f"def f{i}\n" + "return " * (i % 30) + "\n" for i in range(200)))
    command = ["--input", str(tmp_path / "x.txt"), "--split-on", "^def", "--tokenizer", str(tokenizer_file), "--workers", "1"]
    encode_batch = type(tokenizer).encode_batch
    batches = []
    monkeypatch.setattr(type(tokenizer), "encode_batch", lambda self, texts: batches.append(texts) or encode_batch(self, texts))
    assert tokenize.main([*command, "--output", str(tmp_path / "at_once")]) == 0
    assert len(batches) == 1
    monkeypatch.setattr(encode, "_CHARACTERS_AT_ONCE", 150)
    assert tokenize.main([*command, "--output", str(tmp_path / "in_parts")]) == 0
    sizes = [sum(map(len, batch)) for batch in batches[1:]]
    assert len(sizes) > 100
    assert all(size <= 150 or len(batch) == 1 for size, batch in zip(sizes, batches[1:], strict=True))
    assert [text for batch in batches[1:] for text in batch] == batches[0]
    for ending in ("bin", "idx"):
        assert (tmp_path / f"in_parts.{ending}").read_bytes() == (tmp_path / f"at_once.{ending}").read_bytes()


def test_progress_is_shown_while_a_line_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_QUIET_BYTES", MEGABYTE)
    jsonl_bomb(tmp_path / "x.jsonl.gz", gzip.compress)
    calls = []
    corpus = TextCorpus([tmp_path], limited(MEGABYTE))
    documents = list(corpus.documents(lambda *numbers: calls.append(numbers)))
    assert [document.origin for document in documents] == [f"{tmp_path}/x.jsonl.gz:1", f"{tmp_path}/x.jsonl.gz:3"]
    assert len(calls) > NUM_MEGABYTES / 2
    num_decoded = NUM_MEGABYTES * MEGABYTE + len('{"text": "one"}\n{"text": ""}{"text": "two"}')
    assert sum(decoded for _, decoded in calls) == num_decoded
    done = [done for done, _ in calls]
    assert done == sorted(done)
    assert done[-1] == corpus.num_bytes


@pytest.mark.parametrize("compression", PACK)
def test_progress_is_shown_while_frames_decode_to_nothing(tmp_path, compression, monkeypatch):
    monkeypatch.setattr(lines, "_QUIET_BYTES", MEGABYTE)
    (tmp_path / f"x.jsonl.{compression}").write_bytes(PACK[compression](b"") * 2000 + PACK[compression](b'{"text": "one"}'))
    calls = []
    corpus = TextCorpus([tmp_path])
    assert len(list(corpus.documents(lambda *numbers: calls.append(numbers)))) == 1
    assert len(calls) > 5


@pytest.mark.parametrize("compression", PACK)
@settings(max_examples=examples(40))
@given(data=st.data())
def test_any_framing_and_any_pieces_give_the_content(compression, data):
    parts = data.draw(st.lists(st.binary(max_size=300) | st.integers(0, 5000).map(b"a".__mul__), min_size=1, max_size=5))
    offset = data.draw(st.integers(0, 200))
    damaged = data.draw(st.none() | st.integers(0, 100))
    has_zeros = compression in ("gz", "xz")
    zeros = b"\0" * 4 * data.draw(st.integers(0, 10)) if has_zeros else b""
    stored = b"".join(map(PACK[compression], parts)) + zeros
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompress, "CHUNK_BYTES", data.draw(st.integers(1, 70)))
        patch.setattr(decompress, "_INPUT_BYTES", data.draw(st.integers(1, 70)))
        path = Path(directory, f"x.{compression}")
        path.write_bytes(stored)
        with ContentReader(str(path)) as reader:
            chunks = list(reader.chunks(offset))
        assert b"".join(chunks) == b"".join(parts)[offset:]
        assert max(map(len, chunks), default=0) <= decompress.CHUNK_BYTES
        if damaged is not None:
            path.write_bytes(stored[:damaged] + b"\xff" + stored[damaged + 1 :])
            with ContentReader(str(path)) as reader, contextlib.suppress(DamagedError, WindowError):
                list(reader.chunks())


def test_small_cells_of_a_large_dictionary_are_read_in_small_pieces(tmp_path):
    """What is under the limits is text, however small the file is."""
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"text": ["a" * MEGABYTE] * NUM_MEGABYTES}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    lengths, growth = in_child(
        lambda: [document.num_bytes for document in TextCorpus([path], limited(MEGABYTE, 8 * NUM_MEGABYTES * MEGABYTE))]
    )
    assert lengths == [MEGABYTE] * NUM_MEGABYTES
    assert growth < MOST_GROWTH, f"{growth / MEGABYTE:.0f} MiB"


def test_a_list_that_repeats_a_dictionary_is_a_row_group_over_the_limit(tmp_path):
    """Of one row: its decoded size cannot be bounded by reading fewer rows."""
    tags = pa.array([["a" * MEGABYTE] * NUM_MEGABYTES])
    parquet.write_table(pa.table({"text": ["one"], "tags": tags}), tmp_path / "x.parquet", compression="zstd")
    rules = limited(MEGABYTE, 8 * MEGABYTE, "fail", filters=(("tags", "a"),))
    with pytest.raises(CorpusError, match=r"the row group with the rows 1 to 1 has \d+ bytes decoded, over the limit"):
        list(TextCorpus([tmp_path], rules))
    assert len(list(TextCorpus([tmp_path], limited(MEGABYTE, 8 * MEGABYTE, "fail")))) == 1


def test_many_absent_values_are_a_row_group_over_the_limit(tmp_path):
    parquet.write_table(pa.table({"text": pa.array([None] * 300_000, pa.string())}), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 10_000
    with pytest.raises(CorpusError, match="rows 1 to 300000 has"):
        list(TextCorpus([tmp_path], limited(MEGABYTE, 2 * MEGABYTE, "fail")))


def test_a_large_footer_or_header_is_not_parsed(tmp_path):
    for name, content in [
        ("footer.parquet", b"\0" * (17 << 20) + (1 << 24 | 1).to_bytes(4, "little") + b"PAR1"),
        ("footer.arrow", b"ARROW1" + b"\0" * (17 << 20) + (1 << 24 | 1).to_bytes(4, "little") + b"ARROW1"),
        ("header.arrow", b"\xff" * 4 + (1 << 24 | 1).to_bytes(4, "little") + b"\0" * (17 << 20)),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=rf"{name}: .*16777217 bytes.* the limit of 16777216"):
            list(TextCorpus([path]))
        path.unlink()


def test_dictionaries_of_a_stream_survive_the_batches_that_are_left_out(tmp_path):
    dictionary = pa.array(["one", "two"])
    batches = [pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), dictionary) for indices in ([0] * 5000, [1, 0])]
    for name, opened in [("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)]:
        write_arrow(tmp_path / f"{name}.arrow", opened, *(pa.table({"text": batch}) for batch in batches))
        corpus = TextCorpus([tmp_path / f"{name}.arrow"], limited(100, 20_000))
        assert [document.text for document in corpus] == ["two", "one"]
        assert corpus.log.counts.num_too_large == 5000


def repeated_view(entry, num_rows):
    _, view, *texts = pa.array([entry], pa.string_view()).buffers()
    return pa.Array.from_buffers(pa.string_view(), num_rows, [None, pa.py_buffer(view.to_pybytes()[:16] * num_rows), *texts])


@pytest.mark.parametrize("kind", ["dictionary", "run ends", "views", "list views"])
def test_texts_that_rows_share_count_as_often_as_rows_refer_to_them(tmp_path, kind):
    entry, num_rows = "a" * 20_000, 200
    column = {
        "dictionary": lambda: pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int8()), pa.array([entry])),
        "run ends": lambda: pa.RunEndEncodedArray.from_arrays(pa.array([num_rows], pa.int32()), pa.array([entry])),
        "views": lambda: repeated_view(entry, num_rows),
        "list views": lambda: pa.ListViewArray.from_arrays(
            pa.array([0] * num_rows, pa.int32()), pa.array([1] * num_rows, pa.int32()), pa.array([entry])
        ),
    }[kind]()
    path, num_bytes = tmp_path / "x.arrow", 20_000 * num_rows
    with pa.ipc.new_stream(path, pa.schema({"text": pa.string(), "tags": column.type})) as writer:
        writer.write_batch(pa.record_batch({"text": pa.array(["a"] * num_rows), "tags": column}))
    assert path.stat().st_size < 60_000
    rules = [limited(MEGABYTE, limit, "fail", filters=(("tags", "a"),)) for limit in (100_000, num_bytes - 1, 2 * num_bytes)]
    for rule in rules[:2]:
        with pytest.raises(CorpusError, match=r"the record batch with the rows 1 to 200 has 40\d+ bytes decoded, over the limit"):
            list(TextCorpus([path], rule))
    if kind != "list views":
        assert len(list(TextCorpus([path], rules[2]))) == num_rows
