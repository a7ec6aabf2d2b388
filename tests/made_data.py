"""A tokenizer and two small datasets, made by the real commands."""

from __future__ import annotations

from pathlib import Path

from data_tools import tokenize, train_tokenizer

VOCAB_SIZE = 272
"""The special tokens and the bytes, which fit every recipe whose mask has the id 14."""


def make_data(directory: Path) -> None:
    """Write tokenizer.json, the datasets train and validation, and the texts that they are made of."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = str(directory / "tokenizer.json")
    for name, words in {"corpus": "one two three", "other": "four five six"}.items():
        (directory / f"{name}.txt").write_text(f"{words}\n" * 40)
    words = ["--input", str(directory / "corpus.txt"), "--output", tokenizer, "--vocab-size", str(VOCAB_SIZE)]
    assert train_tokenizer.main(words) == 0
    for name, text in {"train": "corpus", "validation": "other"}.items():
        words = ["--input", str(directory / f"{text}.txt"), "--tokenizer", tokenizer, "--output", str(directory / name)]
        assert tokenize.main(words) == 0
