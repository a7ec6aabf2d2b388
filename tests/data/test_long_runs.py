"""Training on long runs: what is cut, and that nothing else changes."""

from __future__ import annotations

import json
import logging
import random
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from data_tools import train_tokenizer as command
from tests.data.conftest import TEXTS
from w1train.data import long_runs as module
from w1train.data.long_runs import LONGEST_RUN, LongRuns, long_runs
from w1train.data.tokenizer import Tokenizer, train_tokenizer

RULES = [{}, {"digits": "triples"}, {"digits": "runs"}, {"whitespace": "lines"}, {"digits": "runs", "whitespace": "lines"}]
LENGTHS = [1, 2, 511, 512, 513, 1023, 1024, 1025, 1026, 1536, 2048, 2049, 5000]


@example([(" ", 511), ("\xa0", 1), ("\u2003", 513)])
@given(st.lists(st.tuples(st.sampled_from(["a", "1", "é", " ", "\n", "\u3000", "-", "_", "\x1c"]), st.sampled_from(LENGTHS)), max_size=6))
def test_exactly_the_long_runs_are_cut(parts):
    """The oracle is a slow search for every run."""
    text = "".join(character * length for character, length in parts)
    white = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    runs = re.finditer(rf"[^\W_]+|[{white}]+|(?:[^\w{white}]|_)+", text)
    expected = [run.span() for run in runs if len(run.group()) > LONGEST_RUN]
    assert list(long_runs(text)) == expected
    pieces = list(LongRuns().cut([text]))
    assert "".join(pieces) == text
    assert all(not list(long_runs(piece)) for piece in pieces)
    assert len(pieces) == 1 + sum((end - start - 1) // LONGEST_RUN for start, end in expected)


def test_white_space_is_that_of_the_library():
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    pieces = pre_tokenizers.Split(Regex(r"\s"), "removed").pre_tokenize_str(text)
    assert "".join(piece for piece, _ in pieces) == re.sub(f"[{module._WHITE_SPACE}]", "", text)


@given(st.lists(st.text()))
def test_other_texts_are_the_same_objects(texts):
    assert list(LongRuns().cut(texts)) == texts


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_an_ordinary_corpus_gives_the_same_file(rules, monkeypatch):
    generator = random.Random(1)
    indented = ["\n".join(" " * generator.randrange(40) + generator.choice(TEXTS) for _ in range(50)) for _ in range(20)]
    texts = [*TEXTS, *indented, "x" * LONGEST_RUN, " " * LONGEST_RUN, "日本語の文。" * 400]
    found = train_tokenizer(texts, 600, **rules)
    monkeypatch.setattr(LongRuns, "cut", lambda self, texts: texts)
    assert found.serialized == train_tokenizer(texts, 600, **rules).serialized


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("character", ["a", " ", "\n", "-"])
def test_the_cut_text_has_the_pieces_of_the_whole_text(rules, character):
    """Cut or not, the pieces before and after a long run are the same."""
    text = f"def f(x):  # {character * 3000}\n    it's 12 y"
    steps = train_tokenizer(TEXTS, 300, **rules)._backend.pre_tokenizer
    whole = [piece for piece, _ in steps.pre_tokenize_str(text)]
    cut = [piece for part in LongRuns().cut([text]) for piece, _ in steps.pre_tokenize_str(part)]
    assert "".join(cut) == "".join(whole)
    assert [piece for piece in cut if len(piece) < 900] == [piece for piece in whole if len(piece) < 900]
    assert max(map(len, cut)) <= LONGEST_RUN + 1


def test_training_on_a_long_run_ends_and_says_what_was_cut(tmp_path, caplog):
    """300,000 letters would take minutes, and give tokens that are too long to be loaded."""
    corpus = tmp_path / "corpus.jsonl"
    texts = ["begin " + "a" * 300_000 + " end", " " * 200_000 + "x", "a text"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with caplog.at_level(logging.WARNING):
        output = tmp_path / "tokenizer.json"
        assert command.main(["--input", str(corpus), "--output", str(output), "--vocab-size", "300"]) == 0
    assert "cut 2 runs of more than 1024 characters" in caplog.text
    assert "(500000 characters in all, the longest run has 300000)" in caplog.text
    tokenizer = Tokenizer.load(output)
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(map(len, tokenizer._backend.get_vocab())) <= LONGEST_RUN


def test_an_ordinary_corpus_has_no_warning(caplog):
    train_tokenizer(TEXTS, 280)
    assert "cut" not in caplog.text
    assert module.LONGEST_RUN == 1024
