"""From a unit of the corpus to tokens: what a worker does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.duplicates import hash_of
from data_tools.text import Document, Rules, UnitReader, UnitText
from data_tools.units import UNIT_BYTES, Unit
from w1train.data.indexed import token_dtype
from w1train.data.tokenizers.tokenizer import Tokenizer

_CHARACTERS_AT_ONCE = UNIT_BYTES


class Split(Protocol):
    """Which documents, or pieces of them, are held out."""

    def __call__(self, document: Document) -> list[tuple[Document, bool]]: ...


@dataclass(frozen=True, slots=True)
class Encoding:
    """What a worker needs to know."""

    rules: Rules
    tokenizer: bytes
    """The content of the tokenizer.json."""
    split: Split
    deduplicate: bool


@dataclass(slots=True)
class TokenizedUnit:
    """Documents of a unit, n of them, as tokens."""

    tokens: NDArray[np.integer]
    """[sum of lengths], each document's EOS included."""
    lengths: NDArray[np.int64]
    """[n], tokens."""
    num_bytes: NDArray[np.int64]
    """[n], of the text in UTF-8."""
    held_out: NDArray[np.bool_]
    """[n]: for validation."""
    hashes: bytes
    """Of each document, if duplicates are sought."""
    text: UnitText
    """Counts and messages; its documents are gone."""


class UnitTokenizer:
    """Called with units. Processes that have been given the same :class:`Encoding` return the same."""

    def __init__(self, encoding: Encoding) -> None:
        self._reader = UnitReader(encoding.rules)
        self._tokenizer = Tokenizer(encoding.tokenizer, origin="the tokenizer")
        self._dtype = token_dtype(self._tokenizer.vocab_size)
        self._split = encoding.split
        self._deduplicate = encoding.deduplicate

    def __call__(self, unit: Unit) -> TokenizedUnit:
        """Read and tokenize. A piece that has no token (there are tokenizers that drop characters) counts as empty."""
        text = self._reader.read(unit)
        pieces = [piece for document in text.documents for piece in self._split(document)]
        tokens, lengths = self._encode([document.text for document, _ in pieces])
        if not lengths.all():
            pieces = [piece for piece, length in zip(pieces, lengths, strict=True) if length]
            text.counts.num_empty += len(lengths) - len(pieces)
            text.counts.num_documents -= len(lengths) - len(pieces)
        text.documents = []
        return TokenizedUnit(
            tokens=tokens,
            lengths=lengths[lengths > 0],
            num_bytes=np.array([document.num_bytes for document, _ in pieces], dtype=np.int64),
            held_out=np.array([held_out for _, held_out in pieces], dtype=bool),
            hashes=b"".join(hash_of(document.text) for document, _ in pieces) if self._deduplicate else b"",
            text=text,
        )

    def _encode(self, texts: Sequence[str]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """(tokens of all texts, each one's number of them with its EOS, or 0 if it has no token).

        The library holds a hundred times the size of what it is given at once: a large text in many pieces goes to it bit by bit.
        """
        tokens, lengths = [self._concatenate([])], [np.zeros(0, dtype=np.int64)]
        for batch in _batches(texts):
            encoded = self._tokenizer.encode_batch(batch)
            tokens.append(self._concatenate([ids for ids in encoded if ids]))
            lengths.append(np.array([len(ids) + 1 if ids else 0 for ids in encoded], dtype=np.int64))
        return np.concatenate(tokens), np.concatenate(lengths)

    def _concatenate(self, encoded: Sequence[Sequence[int]]) -> NDArray[np.integer]:
        eos = (self._tokenizer.eos_token_id,)
        return np.fromiter(chain.from_iterable(chain.from_iterable((ids, eos) for ids in encoded)), dtype=self._dtype)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, in lists of at most about as many characters as a unit has bytes, or of one text that is longer."""
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        if batch and num_characters + len(text) > _CHARACTERS_AT_ONCE:
            yield batch
            batch, num_characters = [], 0
        batch.append(text)
        num_characters += len(text)
    if batch:
        yield batch
