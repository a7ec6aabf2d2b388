"""A small tokenizer, and datasets of given token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from w1train.data.dataset import TokenDataset
from w1train.data.tokenizer import Tokenizer, train_tokenizer
from w1train.data.writer import DatasetWriter

TEXTS = [f"def function_{i}(value):\n    return value + {i}  # the sum, na\u00efve \U0001f600\n" for i in range(50)]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture(scope="session")
def make_dataset(tokenizer: Tokenizer) -> Callable[[Path, Sequence[Sequence[int]]], TokenDataset]:
    """Writes documents of token ids (EOS is appended) under a prefix, and opens them."""

    def make(prefix: Path, documents: Sequence[Sequence[int]]) -> TokenDataset:
        with DatasetWriter(prefix, tokenizer, overwrite=True) as writer:
            for ids in documents:
                writer.add_document(ids, num_text_bytes=len(ids))
            writer.finalize()
        return TokenDataset.open(prefix)

    return make
