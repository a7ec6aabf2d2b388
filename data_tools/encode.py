"""The work of a worker: it turns a unit of the corpus into tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.duplicates import hash_of
from data_tools.unit_reader import SKIP_HINT, Document, Rules, UnitReader, UnitText
from data_tools.units import UNIT_BYTES, Unit
from w1train.data.indexed import token_dtype
from w1train.data.tokenizer import Tokenizer, TokenizerError

_CHARACTERS_AT_ONCE = UNIT_BYTES


class Split(Protocol):
    """The choice of the documents, or pieces of documents, that are held out for validation."""

    def __call__(self, document: Document) -> list[tuple[Document, bool]]: ...


@dataclass(frozen=True, slots=True)
class Encoding:
    """The settings of a worker."""

    rules: Rules
    tokenizer: bytes
    """The content of the tokenizer.json."""
    split: Split
    deduplicate: bool


@dataclass(slots=True)
class TokenizedUnit:
    """The n documents of a unit as tokens."""

    tokens: NDArray[np.integer]
    """[sum of lengths]: the tokens of all documents, each document's EOS included."""
    lengths: NDArray[np.int64]
    """[n]: number of tokens of each document."""
    num_bytes: NDArray[np.int64]
    """[n]: length of each text in bytes of UTF-8."""
    held_out: NDArray[np.bool_]
    """[n]: True for each document that is held out for validation."""
    hashes: bytes
    """The hash of each document; empty unless duplicates are left out."""
    text: UnitText
    """The counts and messages of the unit, without its documents."""


class UnitTokenizer:
    """The function that workers call with units. For equal units and equal settings, every process returns the same result."""

    def __init__(self, encoding: Encoding) -> None:
        self._reader = UnitReader(encoding.rules)
        self._tokenizer = Tokenizer(encoding.tokenizer, origin="the tokenizer")
        self._dtype = token_dtype(self._tokenizer.vocab_size)
        self._split, self._skips = encoding.split, encoding.rules.on_error == "skip"
        self._deduplicate = encoding.deduplicate

    def __call__(self, unit: Unit) -> TokenizedUnit:
        """Read and tokenize a unit. A piece without tokens, which a tokenizer that drops characters may give, counts as empty.

        If the tokenizer cannot encode a piece, this is an error of the unit, unless bad input is left out. An exception would end a worker
        that is a process, and the message would be lost.
        """
        text = self._reader.read(unit)
        pieces = [piece for document in text.documents for piece in self._split(document)]
        tokens, lengths = self._encode([document for document, _ in pieces], text)
        if not (lengths > 0).all():
            pieces = [piece for piece, length in zip(pieces, lengths, strict=True) if length > 0]
            text.counts.num_empty += int((lengths == 0).sum())
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

    def _encode(self, documents: Sequence[Document], unit: UnitText) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """Return the tokens of all documents, and the number of tokens of each with its EOS, or 0 for a document without tokens, or -1 for
        a bad document, which is counted in the unit.

        The library takes a hundred times as much memory as the texts that it gets at once. So a large text in many pieces goes to it a few
        pieces at a time.
        """
        tokens, lengths = [self._concatenate([])], [np.zeros(0, dtype=np.int64)]
        for batch in _batches(documents):
            encoded = self._encode_batch(batch, unit)
            tokens.append(self._concatenate([ids for ids in encoded if ids]))
            lengths.append(np.array([-1 if ids is None else len(ids) + 1 if ids else 0 for ids in encoded], dtype=np.int64))
        return np.concatenate(tokens), np.concatenate(lengths)

    def _encode_batch(self, documents: Sequence[Document], unit: UnitText) -> Sequence[list[int] | None]:
        """Return the token ids of each document, or None for a bad document, which is found by encoding each document alone."""
        try:
            return self._tokenizer.encode_batch([document.text for document in documents])
        except TokenizerError as error:
            if len(documents) > 1:
                return [ids for document in documents for ids in self._encode_batch([document], unit)]
            message = f"{documents[0].origin}: {error}"
            if self._skips:
                unit.leave_out(message)
            else:
                unit.error = unit.error or f"{message} {SKIP_HINT}"
            return [None]

    def _concatenate(self, encoded: Sequence[Sequence[int]]) -> NDArray[np.integer]:
        eos = (self._tokenizer.eos_token_id,)
        return np.fromiter(chain.from_iterable(chain.from_iterable((ids, eos) for ids in encoded)), dtype=self._dtype)


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Yield the documents in order, in lists with at most as many characters as a unit has bytes, or with one longer document."""
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        if batch and num_characters + len(document.text) > _CHARACTERS_AT_ONCE:
            yield batch
            batch, num_characters = [], 0
        batch.append(document)
        num_characters += len(document.text)
    if batch:
        yield batch
