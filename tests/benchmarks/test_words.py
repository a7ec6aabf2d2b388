"""The check of a run's words: what a word is, which words count, and where the result is written."""

from __future__ import annotations

import json

import pytest

from benchmarks import words
from w1train.data.tokenizer import train_tokenizer
from w1train.data.writer import DatasetWriter
from w1train.records.summary import add_to_summary
from w1train.sampling.text import TextSample


def sample(text: str, prompt: str = "", num_tokens: int = 4) -> TextSample:
    return TextSample(prompt, text, list(range(num_tokens)), num_forward_passes=1)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(self): return self.get_value2(Über)", ["def", "self", "return", "self", "get", "value", "Über"]),
        ("if x is 0x1f: ab\n", []),
        ("don't isn't", ["don", "isn"]),
        ("", []),
    ],
)
def test_a_word_is_three_letters_or_more(text, found):
    assert words.words(text) == found


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (sample("return self", num_tokens=3), ["return", "self"]),
        (sample("return sel", num_tokens=4), ["return"]),
        (sample("return self)", num_tokens=4), ["return", "self"]),
        (sample(" main(self)", prompt="def old"), ["main", "self"]),
        (sample("ault(self)", prompt="def"), ["default", "self"]),
        (sample("", prompt="def old", num_tokens=0), []),
    ],
)
def test_only_whole_words_that_the_model_wrote_count(written, found):
    assert words.written_words(written, num_tokens=4) == found


def test_the_corpus_is_the_text_of_all_training_datasets(tmp_path):
    tokenizer = train_tokenizer(["def get_value(self): return 0"], vocab_size=280, mask_token_id=14)
    for name, texts in {"a": ["def get_value", "self.x"], "b": ["return 0"]}.items():
        with DatasetWriter(tmp_path / name, tokenizer) as writer:
            for text in texts:
                writer.add_document(tokenizer.encode(text), num_text_bytes=len(text))
            writer.finalize()
    known = words.corpus_words([str(tmp_path / "a"), str(tmp_path / "b")], tokenizer)
    assert known == {"def", "get", "value", "self", "return"}


def test_the_share_is_of_all_words_of_all_samples():
    samples = [sample("self self other_name"), sample("Self; "), sample("x = 1")]
    assert words.check_words(samples, 9, {"self", "name"}) == {
        "num_samples": 3,
        "num_words": 5,
        "share_in_corpus": pytest.approx(3 / 5),
        "not_in_corpus": ["Self", "other"],
    }
    assert words.check_words([sample("x = 1")], 9, {"self"})["share_in_corpus"] is None


def test_the_result_is_added_to_the_summary(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 3, "words": "old"}))
    add_to_summary(tmp_path, {"words": {"share_in_corpus": float("nan")}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 3, "words": {"share_in_corpus": None}}


def test_a_run_without_a_summary_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        add_to_summary(tmp_path, {"words": {}})


def test_a_directory_that_is_no_run(tmp_path, capsys):
    assert words.main([str(tmp_path)]) == 2
    assert "config.yaml is missing" in capsys.readouterr().err
