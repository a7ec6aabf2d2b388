"""The files of `make post-training`: text, conversations, preferences and held-out questions.

    python -m benchmarks.post_training.question_texts runs/post_training-data

All are functions of the seed, and of how many there are.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.post_training.made_questions import Preference, Question, conversations, preferences, questions, texts
from w1train.config.argument_parser import ArgumentParser
from w1train.config.reading import read_json_object
from w1train.runtime.command import command
from w1train.runtime.files import write_text

QUESTIONS = "questions.json"
TEMPLATE = "template.jinja"
_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ message.content + '\\n' }}{%- else -%}{{ message.content }}{%- endif -%}
{%- endfor -%}
"""
"""A prompt ends with a line break, and an answer with the end of the document."""
_VALIDATION = "_validation"
_TEXT_LENGTH = 127
"""Characters of a text, so that with its end it fills a sample of the recipe."""
_NUM_HELD_OUT = 400


def write_corpus(directory: Path, num_texts: int, num_conversations: int, num_preferences: int, seed: int) -> None:
    """Write all files. Each draws from random numbers of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_split(directory, "", (num_texts, num_conversations, num_preferences), seed)
    _write_split(directory, _VALIDATION, (_NUM_HELD_OUT,) * 3, seed)
    write_text(directory / TEMPLATE, _TEMPLATE)
    asked = islice(_unique(questions(random.Random(f"{seed}/questions"), True)), _NUM_HELD_OUT)
    write_text(directory / QUESTIONS, json.dumps({"questions": [asdict(question) for question in asked]}, indent=1) + "\n")


def _write_split(directory: Path, end: str, sizes: Sequence[int], seed: int) -> None:
    """Write texts, conversations and preferences, so many of each, for training or (with the end of their names) for validation."""
    held_out = end == _VALIDATION

    def drawn(name: str) -> random.Random:
        return random.Random(f"{seed}/{name}{end}")

    records: dict[str, Iterator[dict[str, Any]]] = {
        "text": ({"text": each} for each in texts(drawn("text"), held_out, _TEXT_LENGTH)),
        "conversations": ({"messages": _messages(*each)} for each in conversations(drawn("conversations"), held_out)),
        "preferences": (asdict(each) for each in preferences(drawn("preferences"), held_out)),
    }
    for (name, found), size in zip(records.items(), sizes, strict=True):
        _write(directory / f"{name}{end}.jsonl", islice(found, size))


def read_questions(directory: Path) -> list[Question]:
    """Return the held-out questions.

    Raises:
        UserError: the file is missing, or is no JSON.
    """
    return [Question(**question) for question in read_json_object(directory / QUESTIONS, "list of questions")["questions"]]


def read_preferences(directory: Path) -> list[Preference]:
    """Return the held-out preferences."""
    path = directory / f"preferences{_VALIDATION}.jsonl"
    return [Preference(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _messages(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _unique(found: Iterator[Question]) -> Iterator[Question]:
    seen: set[Question] = set()
    for question in found:
        if question not in seen:
            seen.add(question)
            yield question


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


@command("benchmarks.post_training.question_texts")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = ArgumentParser(
        prog="python -m benchmarks.post_training.question_texts", description="Write the text and questions of make post-training."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the files go")
    parser.add_argument("--texts", type=int, default=20_000, metavar="N", help="texts to pretrain on (default: %(default)s)")
    parser.add_argument("--conversations", type=int, default=40_000, metavar="N", help="conversations to train on (default: %(default)s)")
    parser.add_argument("--preferences", type=int, default=4_000, metavar="N", help="preferences to train on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all files (default: %(default)s)")
    options = parser.parse_args(arguments)
    write_corpus(options.directory, options.texts, options.conversations, options.preferences, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
