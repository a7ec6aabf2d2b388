"""The tokens of conversations, and which of them a model writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from w1train.config.reading import shorten
from w1train.data.conversations.chat_template import ChatTemplate
from w1train.data.conversations.messages import Conversation, ConversationError, Message, TokenRow
from w1train.data.conversations.rendering import Piece, Rendering, SpecialNames
from w1train.data.tokenizer import Tokenizer

_SHOWN_TOKENS = 6
"""The tokens that a message shows on each side of a difference."""


@dataclass(frozen=True, slots=True)
class ChatDocument:
    """A conversation as a document. Every document but one that was cut ends with EOS."""

    ids: list[int]
    may_be_noised: list[bool]
    """True for each token that the model writes: the replies with the tokens that end them."""
    num_bytes: int
    """The length of the text in UTF-8."""

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first reply."""
        return self.may_be_noised.index(True)

    def cut(self, length: int) -> ChatDocument:
        """Return the first tokens, without EOS: a reply that was cut and has an end token would teach the model to stop early."""
        assert self.prompt_length < length < len(self.ids), "a part of the reply is left"
        share = max(1, self.num_bytes * length // len(self.ids))
        return ChatDocument(self.ids[:length], self.may_be_noised[:length], share)


class ChatEncoder:
    """The encoder of conversations by a chat template and a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, renamed: Mapping[str, str]) -> None:
        """
        Args:
            renamed: as for :class:`SpecialNames`.
        """
        self._tokenizer, self._template = tokenizer, template
        self._names = SpecialNames(tokenizer.special_tokens, renamed)
        ids = tokenizer.ids_by_token()
        self._special_ids = {ids[name] for name in tokenizer.special_tokens}
        self._ids = ids

    def prompt(self, messages: Sequence[Message], for_template: Mapping[str, Any]) -> list[int]:
        """Return the tokens after which the model writes its reply to messages.

        Raises:
            ConversationError: if the template does not take the messages, or a text cannot be encoded safely.
        """
        return self._encode(self._render(messages, for_template, add_generation_prompt=True))

    def document(self, conversation: Conversation, replies: Sequence[int]) -> ChatDocument:
        """Return the document of a conversation up to the last of the given replies.

        Args:
            replies: the places among the messages of the replies to learn, ascending.

        Raises:
            ConversationError: as :meth:`prompt`; or if the tokens before a reply are not those that the model sees when it writes it.
        """
        messages = conversation.messages[: replies[-1] + 1]
        bounds = (self._marked_bounds if self._template.marks_replies else self._prefix_bounds)(
            messages, replies, conversation.for_template
        )
        whole = bounds[-1][1]
        ids = self._encode(whole)
        flags = [False] * len(ids)
        for prompt, through in bounds:
            start = self._prefix_length(prompt, ids)
            end = len(ids) if through is whole else self._prefix_length(through, ids)
            if start == end:
                raise ConversationError("no_reply", "the reply has no tokens")
            flags[start:end] = [True] * (end - start)
        return _ended(ids, flags, self._tokenizer.eos_token_id, len(whole.text.encode("utf-8")))

    def tokenized(self, row: TokenRow) -> ChatDocument:
        """Return the document of a conversation that was tokenized before. EOS and <pad> at its end are fill, of which one EOS stays.

        Raises:
            ConversationError: if an id is not in the vocabulary, a token is the mask, or no reply is left.
        """
        vocab_size, mask = self._tokenizer.vocab_size, self._tokenizer.mask_token_id
        if outside := [token for token in row.ids if not 0 <= token < vocab_size]:
            raise ConversationError("vocabulary", f"token id {outside[0]} is outside the tokenizer's vocabulary of {vocab_size} ids")
        if mask in row.ids:
            raise ConversationError("mask", f"token {row.ids.index(mask)} is the mask token ({mask}), which no text has")
        fill = {self._tokenizer.eos_token_id, self._tokenizer.pad_token_id}
        length = len(row.ids) - sum(1 for _ in takewhile(fill.__contains__, reversed(row.ids)))
        if not any(row.is_reply[:length]):
            raise ConversationError("no_reply", "the reply is EOS and <pad> alone")
        ids = row.ids[:length]
        text = self._tokenizer.decode(ids)
        return _ended(ids, row.is_reply[:length], self._tokenizer.eos_token_id, max(1, len(text.encode("utf-8"))))

    def _render(self, messages: Sequence[Message], for_template: Mapping[str, Any], *, add_generation_prompt: bool) -> Rendering:
        try:
            marked, values = self._names.marked(list(messages)), self._names.marked(dict(for_template))
        except RecursionError as error:
            raise ConversationError("format", "its lists and objects are nested too deeply") from error
        return self._names.parse(self._template.render(marked, add_generation_prompt, values))

    def _prefix_bounds(
        self, messages: Sequence[Message], replies: Sequence[int], for_template: Mapping[str, Any]
    ) -> list[tuple[Rendering, Rendering]]:
        """Return, for each reply, the text before it, which is that of the messages before it, and the text up to its end."""
        return [
            (
                self._render(messages[:place], for_template, add_generation_prompt=True),
                self._render(messages[: place + 1], for_template, add_generation_prompt=False).stripped(),
            )
            for place in replies
        ]

    def _marked_bounds(
        self, messages: Sequence[Message], replies: Sequence[int], for_template: Mapping[str, Any]
    ) -> list[tuple[Rendering, Rendering]]:
        """Return the texts of :meth:`_prefix_bounds` from the marks of the template. If a special token follows a reply at once, it ends
        the turn, and belongs to the reply."""
        whole = self._render(messages, for_template, add_generation_prompt=False)
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if len(whole.replies) != len(places):
            raise ConversationError(
                "template", f"the chat template marks {len(whole.replies)} texts by {{% generation %}}, for {len(places)} replies"
            )
        spans = dict(zip(places, whole.replies, strict=True))
        return [(whole.before(spans[place][0]), whole.before(whole.end_of_turn(spans[place][1]))) for place in replies]

    def _encode(self, rendering: Rendering) -> list[int]:
        """Return the tokens of a rendering.

        The library encodes the whole, as it does in transformers. If a text has the name of a special token, the library would read it as
        the token. So the texts between the template's special tokens are then encoded one by one. A tokenizer for which this makes a
        difference elsewhere (it puts a blank before each text, for example) cannot encode the row.
        """
        texts = [piece.text for piece in rendering.pieces if not piece.is_special]
        names = [name for text in texts for name in self._names.present_names(text)]
        if not names:
            ids = self._tokenizer.encode_with_special_tokens(rendering.text)
        else:
            neutral = [piece if piece.is_special else Piece(self._names.without_names(piece.text), False) for piece in rendering.pieces]
            ids = self._encode_pieces(rendering.pieces, names[0])
            if self._encode_pieces(neutral, names[0]) != self._tokenizer.encode_with_special_tokens(
                "".join(piece.text for piece in neutral)
            ):
                raise ConversationError("special", f"the tokenizer cannot encode {shorten(names[0])} in a message as text: remove it")
        if self._tokenizer.mask_token_id in ids:
            raise ConversationError("mask", "the chat template writes the mask token, which no text has")
        return ids

    def _encode_pieces(self, pieces: Sequence[Piece], name: str) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            tokens = [self._ids[piece.text]] if piece.is_special else self._tokenizer.encode(piece.text)
            if not piece.is_special and not self._special_ids.isdisjoint(tokens):
                raise ConversationError("special", f"the tokenizer encodes {shorten(name)} in a message as a special token: remove it")
            ids += tokens
        return ids

    def _prefix_length(self, part: Rendering, whole: Sequence[int]) -> int:
        """Return the number of tokens of the beginning of a conversation.

        Raises:
            ConversationError: if these tokens are not the first of the whole.
        """
        ids = self._encode(part)
        if ids == list(whole[: len(ids)]):
            return len(ids)
        place = next((i for i, (one, other) in enumerate(zip(ids, whole, strict=False)) if one != other), len(whole))
        shown = [shorten(self._tokenizer.decode(tokens[place : place + _SHOWN_TOKENS])) for tokens in (ids, list(whole))]
        raise ConversationError(
            "prefix",
            f"the tokens that the model sees before its reply are not those of the conversation: token {place} begins {shown[0]} in the "
            f"former and {shown[1]} in the latter. Give a template that writes a special token or a line break before the reply, and does "
            "not change the messages before it (--replies split, if a template does this to earlier replies)",
        )


def _ended(ids: list[int], flags: list[bool], eos_token_id: int, num_bytes: int) -> ChatDocument:
    """Return a document that ends with EOS once, which the model writes."""
    if ids[-1] == eos_token_id:
        ids, flags = ids[:-1], flags[:-1]
    return ChatDocument([*ids, eos_token_id], [*flags, True], num_bytes)
