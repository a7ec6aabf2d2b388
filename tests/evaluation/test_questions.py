"""Files of texts and questions, and what is made of the scores."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import os
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from tests.tiny import tiny_config
from w1train.config.errors import UserError
from w1train.config.schema import DiffusionConfig
from w1train.evaluation.questions import Answer, Question, answer_questions, read_questions, summarize


def write(path, *records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


class LetterTokenizer:
    def encode(self, text):
        return [ord(letter) for letter in text]


@dataclass
class FakeModel:
    """Prefers letters late in the alphabet, wherever they are."""

    config: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            diffusion=DiffusionConfig(mask_token_id=0), model=SimpleNamespace(vocab_size=128, max_sequence_length=12)
        )
    )
    tokenizer: LetterTokenizer = field(default_factory=LetterTokenizer)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def predict(self, tokens, _timesteps):
        return (torch.arange(128.0) / 10).expand(*tokens.shape, -1)


def log_probability(text: str) -> float:
    by_letter = (torch.arange(128.0) / 10).double().log_softmax(dim=0)
    return sum(by_letter[ord(letter)].item() for letter in text)


def answers_to(path):
    return answer_questions(FakeModel(), read_questions(path), num_draws=128, batch_size=4)


def test_completions_and_choices_are_scored(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        {"prompt": "ab", "completion": "xyz"},
        "",
        {"prompt": "", "choices": ["a", "z", "m"], "answer": 1},
        {"prompt": "c", "choices": ["zz", "y"], "answer": 0},
    )
    answers = answers_to(path)
    assert [answer.question.line for answer in answers] == [1, 3, 4]
    found = [score for answer in answers for score in answer.log_likelihoods]
    assert found == pytest.approx([log_probability(text) for text in ("xyz", "a", "z", "m", "zz", "y")], rel=1e-6)
    summary = summarize(answers)
    right = log_probability("xyz") + log_probability("z") + log_probability("zz")
    assert summary["num_texts"] == 3
    assert summary["num_questions"] == 2
    assert summary["nats_per_token"] == pytest.approx(-right / 6, rel=1e-6)
    assert summary["bits_per_byte"] == pytest.approx(-right / 6 / math.log(2), rel=1e-6)
    # "zz" is less likely than "y", and likelier by the byte.
    assert summary["accuracy"] == 0.5
    assert summary["accuracy_by_byte"] == 1.0


def test_bytes_are_those_of_utf_8():
    answer = Answer(Question(1, "", ("\u00e9\u00e9", "abc"), 0), (-4.0, -3.5), (1, 1))
    assert answer.num_bytes == (4, 3)
    assert (answer.chosen, answer.chosen_by_byte) == (1, 0)


def test_no_questions_no_accuracy(tmp_path):
    summary = summarize(answers_to(write(tmp_path / "x.jsonl", {"prompt": "", "completion": "a"})))
    assert summary["accuracy"] is None
    assert summary["num_questions"] == 0


@pytest.mark.parametrize(
    "record",
    [
        "{",
        '{"prompt": "a", "completion": "\\ud800"}',
        [],
        {"prompt": "a"},
        {"prompt": "a", "completion": ""},
        {"prompt": 1, "completion": "a"},
        {"prompt": "a", "completion": "b", "answer": 0},
        {"prompt": "a", "choices": ["b"], "answer": 0},
        {"prompt": "a", "choices": ["b", ""], "answer": 0},
        {"prompt": "a", "choices": ["b", 3], "answer": 0},
        {"prompt": "a", "choices": ["b", "c"], "answer": 2},
        {"prompt": "a", "choices": ["b", "c"], "answer": -1},
        {"prompt": "a", "choices": ["b", "c"], "answer": True},
        {"prompt": "a", "choices": ["b", "c"]},
    ],
    ids=str,
)
def test_a_bad_line_is_named_with_what_it_must_be(tmp_path, record):
    path = write(tmp_path / "x.jsonl", {"prompt": "", "completion": "a"}, record)
    with pytest.raises(UserError, match=r"x.jsonl, line 2, is .*must be \{.prompt"):
        read_questions(path)


def test_lines_end_at_newlines_alone(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"prompt": "a\u2028", "completion": "b"}', {"prompt": "c", "completion": "d"})
    assert [question.prompt for question in read_questions(path)] == ["a\u2028", "c"]


def test_files_are_read_as_by_the_data_tools(tmp_path):
    """Byte order marks, compression and arrays."""
    records = [{"prompt": "\ufeffa", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    lines = "".join(f"\ufeff{json.dumps(record, ensure_ascii=False)}\n" for record in records)
    (tmp_path / "x.jsonl").write_text(lines)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "x.json.xz").write_bytes(lzma.compress(json.dumps(records, indent=1).encode()))
    for name in ("x.jsonl", "x.jsonl.gz", "x.json.xz"):
        assert [question.prompt for question in read_questions(tmp_path / name)] == ["a", "c"]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-10])
    with pytest.raises(UserError, match=r"cannot read .*x\.jsonl\.gz: the compressed file is damaged here"):
        read_questions(tmp_path / "x.jsonl.gz")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q.parquet", "it is a table by its name, and questions are read as JSONL"),
        ("q.ARROW.gz", "it is a table by its name"),
        ("q.jsonl.lz4", r"files ending in \.lz4 cannot be read: unpack it, or compress"),
        ("q.zip", r"files ending in \.zip cannot be read"),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match=rf"cannot read .*{name}: {message}"):
        read_questions(tmp_path / name)


def test_files_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot read"):
        read_questions(tmp_path / "absent")
    with pytest.raises(UserError, match="has no lines"):
        read_questions(write(tmp_path / "empty"))
    monkeypatch.setattr("w1train.evaluation.questions._LARGEST", 10)
    with pytest.raises(UserError, match=r"large is too large: it has more than 10 bytes"):
        read_questions(write(tmp_path / "large", {"prompt": "", "completion": "a"}))
    monkeypatch.undo()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe is not a regular file"):
        read_questions(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"line 1 has the mask token \(0\)"):
        answers_to(write(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b\0"}))
    with pytest.raises(UserError, match=r"line 1 has the token id 233, and model.vocab_size is 128"):
        answers_to(write(tmp_path / "x.jsonl", {"prompt": "a", "completion": "é"}))
    with pytest.raises(UserError, match=r"line 1 has 3 \+ 10 tokens, more than model.max_sequence_length = 12"):
        answers_to(write(tmp_path / "x.jsonl", {"prompt": "abc", "completion": 10 * "a"}))


def test_a_run_without_masks_alone_cannot_score_completions():
    model = SimpleNamespace(config=tiny_config(diffusion={"objective": "hybrid", "num_noise_ids": 96}))
    with pytest.raises(UserError, match=r"diffusion.objective=hybrid.*diffusion.objective=diffusion.*for every process"):
        answer_questions(model, [Question(1, "", ("a",), 0)], num_draws=1, batch_size=1)
