"""From a unit of the corpus to tokens: what a worker does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.duplicates import hash_of
from data_tools.text import Document, Rules, UnitReader, UnitText
from data_tools.units import Unit
from w1train.data.indexed import token_dtype
from w1train.data.tokenizer import Tokenizer


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
        encoded = self._tokenizer.encode_batch([document.text for document, _ in pieces])
        if not all(encoded):
            text.counts.num_empty += sum(not ids for ids in encoded)
            text.counts.num_documents -= sum(not ids for ids in encoded)
            pieces, encoded = [p for p, ids in zip(pieces, encoded, strict=True) if ids], [ids for ids in encoded if ids]
        text.documents = []
        return TokenizedUnit(
            tokens=self._concatenate(encoded),
            lengths=np.array([len(ids) + 1 for ids in encoded], dtype=np.int64),
            num_bytes=np.array([document.num_bytes for document, _ in pieces], dtype=np.int64),
            held_out=np.array([held_out for _, held_out in pieces], dtype=bool),
            hashes=b"".join(hash_of(document.text) for document, _ in pieces) if self._deduplicate else b"",
            text=text,
        )

    def _concatenate(self, encoded: Sequence[Sequence[int]]) -> NDArray[np.integer]:
        eos = (self._tokenizer.eos_token_id,)
        return np.fromiter(chain.from_iterable(chain.from_iterable((ids, eos) for ids in encoded)), dtype=self._dtype)
