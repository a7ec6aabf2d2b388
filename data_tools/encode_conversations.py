"""The work of a worker: it turns a unit of records into the tokens of conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_tools.split import is_validation
from data_tools.unit_reader import Rules, UnitReader, UnitText
from data_tools.units import Unit
from w1train.data.conversations.chat_template import ChatTemplate, TemplateSource
from w1train.data.conversations.chat_tokens import ChatDocument, ChatEncoder
from w1train.data.conversations.messages import Conversation, ConversationError, Preference, TokenRow, row_of
from w1train.data.indexed import token_dtype
from w1train.data.text.file_names import CorpusError
from w1train.data.tokenizer import Tokenizer, TokenizerError

Replies = Literal["last", "all", "split"]
Kind = Literal["conversations", "preferences"]


@dataclass(frozen=True, slots=True)
class ChatEncoding:
    """The settings of a worker."""

    rules: Rules
    tokenizer: bytes
    """The content of the tokenizer.json."""
    renamed: Mapping[str, str]
    """The present name of each special token that the import of the tokenizer renamed."""
    template: TemplateSource
    format: str | None
    """A key of FORMATS; None = the keys of each record tell its format."""
    kind: Kind
    replies: Replies
    max_length: int | None
    """The most tokens of a document, EOS included; None = no limit."""
    too_long: Literal["drop", "cut"]
    validation_fraction: float


@dataclass(slots=True)
class EncodedUnit:
    """The n documents of a unit as tokens."""

    tokens: NDArray[np.integer]
    """[sum of lengths]: the tokens of all documents."""
    may_be_noised: NDArray[np.bool_]
    """[sum of lengths]: True for each token that a model writes."""
    lengths: NDArray[np.int64]
    """[n]: number of tokens of each document."""
    num_bytes: NDArray[np.int64]
    """[n]: length of each text in bytes of UTF-8."""
    held_out: NDArray[np.bool_]
    """[n]: True for each document that is held out for validation."""
    counts: Counter[str]
    """Numbers of rows that were read and left out, and of documents that were cut, by the names of the manifest."""
    text: UnitText
    """The counts and messages about input that cannot be read."""


@dataclass(slots=True)
class _Documents:
    """The documents of the unit that is read."""

    documents: list[ChatDocument] = field(default_factory=list)
    held_out: list[bool] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class ConversationReader(UnitReader):
    """The function that workers call with units. For equal units and equal settings, every process returns the same result."""

    def __init__(self, encoding: ChatEncoding) -> None:
        super().__init__(encoding.rules)
        self._encoding = encoding
        self._tokenizer = Tokenizer(encoding.tokenizer, origin="the tokenizer")
        self._encoder = ChatEncoder(self._tokenizer, ChatTemplate(encoding.template), encoding.renamed)
        self._dtype = token_dtype(self._tokenizer.vocab_size)
        self._unit = _Documents()

    def __call__(self, unit: Unit) -> EncodedUnit:
        """Read and encode a unit."""
        self._unit = _Documents()
        text = self.read(unit)
        documents = self._unit.documents
        lengths = np.array([len(document.ids) for document in documents], dtype=np.int64)
        return EncodedUnit(
            tokens=np.array([token for document in documents for token in document.ids], dtype=self._dtype),
            may_be_noised=np.array([flag for document in documents for flag in document.may_be_noised], dtype=np.bool_),
            lengths=lengths,
            num_bytes=np.array([document.num_bytes for document in documents], dtype=np.int64),
            held_out=np.array(self._unit.held_out, dtype=np.bool_),
            counts=self._unit.counts,
            text=text,
        )

    def add_record(self, result: UnitText, record: object, origin: str, kind: str) -> None:
        """Add the documents of a conversation or a pair, and count it."""
        counts = self._unit.counts
        counts["num_rows"] += 1
        try:
            row = row_of(record, self._encoding.format)
            documents = self._limited(self._documents(row), result, origin)
        except ConversationError as error:
            counts[f"num_bad_{error.reason}"] += 1
            raise
        except TokenizerError as error:
            counts["num_bad_tokenizer"] += 1
            raise CorpusError(str(error)) from error
        result.counts.num_documents += len(documents)
        self._unit.documents += documents
        self._unit.held_out += [is_validation(_first_prompt(row), self._encoding.validation_fraction)] * len(documents)

    def _documents(self, row: Conversation | Preference | TokenRow) -> list[ChatDocument]:
        """Return the documents of a row: a document, a document for each reply, or the two of a pair."""
        if isinstance(row, Preference) != (self._encoding.kind == "preferences"):
            found, wanted = (
                ("a pair of replies", "conversations") if isinstance(row, Preference) else ("a conversation", "pairs of replies")
            )
            raise ConversationError("format", f"it is {found}, and the dataset is of {wanted}, as its first record: make two datasets")
        if isinstance(row, Preference):
            pair = [self._encoder.document(side, side.replies[-1:]) for side in (row.chosen, row.rejected)]
            if pair[0].ids == pair[1].ids:
                raise ConversationError("equal_pair", "the tokens of chosen and rejected are equal")
            return pair
        if isinstance(row, TokenRow):
            return [self._one_reply(self._encoder.tokenized(row))]
        replies = row.replies
        if self._encoding.replies == "split":
            return [self._encoder.document(row, [place]) for place in replies]
        return [self._encoder.document(row, replies if self._encoding.replies == "all" else replies[-1:])]

    def _one_reply(self, document: ChatDocument) -> ChatDocument:
        """Refuse several replies in a row of tokens, unless all replies are wanted."""
        num_replies = sum(
            1 for before, flag in zip([False, *document.may_be_noised], document.may_be_noised, strict=False) if flag > before
        )
        if num_replies > 1 and self._encoding.replies != "all":
            raise ConversationError("several_replies", f"its mask has {num_replies} replies, which only --replies all takes")
        return document

    def _limited(self, documents: list[ChatDocument], result: UnitText, origin: str) -> list[ChatDocument]:
        """Drop or cut documents that are too long. Of a pair that loses a side, nothing stays."""
        limit, counts = self._encoding.max_length, self._unit.counts
        kept = []
        for document in documents:
            if limit is None or len(document.ids) <= limit:
                kept.append(document)
            elif document.prompt_length >= limit:
                self._drop(result, "num_prompt_too_long", f"{origin}: the prompt has {document.prompt_length} tokens, and no reply fits")
            elif self._encoding.too_long == "cut":
                counts["num_cut"] += 1
                kept.append(document.cut(limit))
            else:
                self._drop(result, "num_too_long", f"{origin}: it has {len(document.ids)} tokens")
        if self._encoding.kind == "preferences" and len(kept) == 1:
            counts["num_without_other_side"] += 1
            return []
        return kept

    def _drop(self, result: UnitText, name: str, message: str) -> None:
        self._unit.counts[name] += 1
        result.leave_out(f"{message} (--max-length {self._encoding.max_length})", num_bad=0)


def _first_prompt(row: Conversation | Preference | TokenRow) -> str:
    """Return the text that decides whether a row is held out: rows of one prompt are all on one side."""
    if isinstance(row, TokenRow):
        return str(row.ids[: row.is_reply.index(True)])
    messages = (row.chosen if isinstance(row, Preference) else row).messages
    return next(message["content"] for message in messages if message["role"] == "user")
