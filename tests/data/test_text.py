"""Documents come in a fixed order; what is not text is named or counted; nothing is lost in silence."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.corpus import TextCorpus
from data_tools.unit_reader import Rules, splitter
from w1train.data.text.file_names import CorpusError


def texts_of(*paths, **options):
    extensions = options.pop("extensions", ())
    return [document.text for document in TextCorpus(paths, Rules(**options), extensions=extensions)]


def test_directories_are_searched_in_sorted_order(tmp_path):
    for name in ["b.txt", "a/z.txt", "a/y.md", "a.txt", ".hidden/x.txt", ".x.txt"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert texts_of(tmp_path) == ["a/y.md", "a/z.txt", "a.txt", "b.txt"]
    assert texts_of(tmp_path, extensions=[".txt"]) == ["a/z.txt", "a.txt", "b.txt"]
    assert texts_of(tmp_path / "b.txt", tmp_path / "a") == ["b.txt", "a/y.md", "a/z.txt"]


def test_missing_and_empty_corpora(tmp_path):
    with pytest.raises(CorpusError, match=r"nowhere does not exist"):
        TextCorpus([tmp_path / "nowhere"])
    with pytest.raises(CorpusError, match="no files under"):
        TextCorpus([tmp_path])
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(CorpusError, match=r"no files ending in \.md"):
        TextCorpus([tmp_path], extensions=[".md"])
    corpus = TextCorpus([tmp_path])
    with pytest.raises(CorpusError, match=r"no text in 2 files \(2 empty documents"):
        list(corpus)


def test_undecodable_file(tmp_path, caplog):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(CorpusError, match=r"bad\.txt: byte 3 \(0xe9\) is not UTF-8"):
        texts_of(tmp_path)
    corpus = TextCorpus([tmp_path], Rules(on_error="skip"))
    with caplog.at_level(logging.INFO):
        assert [document.text for document in corpus] == ["good"]
    assert corpus.log.counts.num_bad == 1
    assert "bad.txt: byte 3" in caplog.text
    assert "left out 1 files or lines" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a\xff"}', r"x\.jsonl:2: byte 26 \(0xff\) is not UTF-8"),
        (b'{"text": ', r"x\.jsonl:2: not JSON"),
        (b"[" * 100_000, r"x\.jsonl:2: the lists and objects are nested too deeply"),
        (b'{"body": "a"}', r"x\.jsonl:2: no JSON object with a string 'text'"),
        (b'{"text": 3}', r"x\.jsonl:2: no JSON object with a string 'text'"),
        (b"[1]", r"x\.jsonl:2: no JSON object"),
        (b'{"text": "\\ud800"}', r"x\.jsonl:2: character 0 of 'text' is a lone surrogate"),
    ],
)
def test_bad_jsonl_lines(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}' + b"\n" + line + b"\n\n" + b'{"text": "two"}')
    with pytest.raises(CorpusError, match=message.replace("26", str(len(b'{"text": "one"}\n') + line.find(b"\xff")))):
        texts_of(path)
    corpus = TextCorpus([path], Rules(on_error="skip"))
    assert [document.origin for document in corpus] == [f"{path}:1", f"{path}:4"]
    assert (corpus.log.counts.num_documents, corpus.log.counts.num_bad, corpus.log.counts.num_empty) == (2, 1, 1)


@given(st.lists(st.text().filter(str.strip), min_size=1))
def test_jsonl_round_trip(texts):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "x.jsonl")
        path.write_text("".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(texts)))
        documents = list(TextCorpus([path], Rules(text_field="body")))
    assert [document.text for document in documents] == texts
    assert [document.num_bytes for document in documents] == [len(text.encode()) for text in texts]


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt"])
@given(
    content=st.binary()
    | st.lists(st.sampled_from([b'{"text":', b'"a"', b"}", b"\n", b"\xff", b"\xef\xbb\xbf", b"[", b"null"])).map(b"".join)
)
def test_arbitrary_bytes_are_text_or_counted(name, content):
    """Each line of JSONL, and each text file, is a document, empty or bad: no other outcome, no other exception."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, name)
        path.write_bytes(content)
        corpus = TextCorpus([path], Rules(on_error="skip"))
        try:
            num_documents = len(list(corpus))
        except CorpusError:
            num_documents = 0
    num_lines = content.count(b"\n") + (not content.endswith(b"\n") and bool(content))
    assert num_documents == corpus.log.counts.num_documents
    assert corpus.num_bytes_read == corpus.num_bytes == len(content)
    assert corpus.log.counts.num_documents + corpus.log.counts.num_empty + corpus.log.counts.num_bad == (
        num_lines if name == "x.jsonl" else 1
    )


def test_byte_order_mark_is_dropped_and_newlines_are_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\n')
    assert texts_of(tmp_path) == ["one\r\ntwo\r", "three"]


def test_splitting(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text(" = First = \n\n body \n = = Section = = \n\n = Second = \n more")
    pieces = [" = First = \n\n body \n = = Section = = \n\n", " = Second = \n more"]
    assert texts_of(path, split_on=r"^ = [^=].* = $") == pieces
    assert [document.origin for document in TextCorpus([path], Rules(split_on="^ = Second"))] == [f"{path}#0", f"{path}#1"]
    assert texts_of(path, split_on="blank-lines") == [" = First = ", "body \n = = Section = = ", "= Second = \n more"]
    with pytest.raises(CorpusError, match=r"neither blank-lines nor a regular expression"):
        TextCorpus([path], Rules(split_on="("))


@given(st.text("ab\n", min_size=1), st.sampled_from(["a", "^", "b*", "$", r"\n"]))
def test_splitting_at_a_pattern_loses_nothing(text, pattern):
    pieces = splitter(pattern)("x" + text)
    assert "".join(pieces) == "x" + text


def test_links_to_directories_are_left_out_and_said_to_be(tmp_path, caplog):
    (tmp_path / "corpus/inner").mkdir(parents=True)
    (tmp_path / "corpus/inner/a.txt").write_text("text")
    for name in ("up", "inner/up"):
        (tmp_path / "corpus" / name).symlink_to(tmp_path, target_is_directory=True)
    assert texts_of(tmp_path / "corpus") == ["text"]
    assert f"left out 2 links to directories, such as {tmp_path}/corpus/inner/up" in caplog.text


def test_a_link_that_leads_nowhere_is_no_text_file(tmp_path):
    """Which could not be filtered by a field, and is not counted as read."""
    (tmp_path / "a.txt").symlink_to("gone")
    (tmp_path / "b.jsonl").write_text('{"text": "b", "language": "en"}\n{"text": "c", "language": "de"}\n')
    corpus = TextCorpus([tmp_path], Rules(filters=(("language", "en"),), on_error="skip"))
    assert [document.text for document in corpus] == ["b"]
    assert corpus.summary().startswith("1 files (1 jsonl)")


def test_pipes_in_a_directory_are_left_out(tmp_path, caplog):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("b")
    assert texts_of(tmp_path) == ["b"]
    assert "left out 1 entries" in caplog.text
