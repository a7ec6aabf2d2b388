"""The output of chat templates: texts and special tokens.

The name of a special token counts as the token only where the template wrote it. Before the rendering, each name in a message is put
between two marks, as transformers does it from version 5.24 on. The template sees the messages otherwise unchanged, so it can compare,
split and trim them. After the rendering, a name between marks is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from w1train.data.conversations.chat_template import REPLY_END, REPLY_START
from w1train.data.conversations.messages import ConversationError

_NAME_START, _NAME_END = "\ufdd0", "\ufdd1"
_RESERVED = re.compile(f"[{_NAME_START}{_NAME_END}{REPLY_START}{REPLY_END}]")


class Piece(NamedTuple):
    """A part of a rendering."""

    text: str
    is_special: bool
    """This flag tells whether the text is the name of a special token, and stands for it."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """The text of a conversation in pieces. Neighbouring texts are one piece."""

    pieces: tuple[Piece, ...]
    replies: tuple[tuple[int, int], ...] = ()
    """The first character, and one past the last, of each reply that the template marks."""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece.text for piece in self.pieces)

    def before(self, place: int) -> Rendering:
        """Return the rendering up to a character, which is not inside of a special token."""
        kept, start = [], 0
        for piece in self.pieces:
            if start >= place:
                break
            kept.append(Piece(piece.text[: place - start], piece.is_special))
            start += len(piece.text)
        return Rendering(tuple(kept))

    def end_of_turn(self, place: int) -> int:
        """Return where the special token ends that begins at a character; the character itself if no special token begins there."""
        start = 0
        for piece in self.pieces:
            if start == place and piece.is_special:
                return start + len(piece.text)
            start += len(piece.text)
        return place

    def stripped(self) -> Rendering:
        """Return the rendering without white space at its end. Many templates write a line break behind the token that ends a turn. A model
        that has ended its turn writes no line break, and one that stays clean there would show where the reply ends."""
        pieces = list(self.pieces)
        if pieces and not pieces[-1].is_special:
            text = pieces.pop().text.rstrip()
            pieces += [Piece(text, False)] if text else []
        return Rendering(tuple(pieces))


class SpecialNames:
    """The names by which messages and templates may mean special tokens."""

    def __init__(self, names: Iterable[str], renamed: Mapping[str, str]) -> None:
        """
        Args:
            names: the special tokens of the tokenizer.
            renamed: the present name of each token that had another name in the published tokenizer, for which the template was written.
        """
        self._present = {**{name: name for name in names}, **renamed}
        # Of two names at one place, the longer one is meant.
        self._any = "|".join(re.escape(name) for name in sorted(self._present, key=len, reverse=True)) or "(?!)"
        self._name = re.compile(self._any)
        self._parts = re.compile(f"{_NAME_START}({self._any}){_NAME_END}|({_RESERVED.pattern})|({self._any})")

    def marked(self, value: Any) -> Any:
        """Return a value of a record with marks around each name in its texts, also inside of lists and objects.

        Raises:
            ConversationError: if a text has one of the characters that serve as marks.
        """
        if isinstance(value, str):
            if found := _RESERVED.search(value):
                raise ConversationError(
                    "reserved", f"a message has the character U+{ord(found.group()):04X}, which Unicode reserves for programs: remove it"
                )
            return self._name.sub(f"{_NAME_START}\\g<0>{_NAME_END}", value)
        if isinstance(value, dict):
            return {key: self.marked(each) for key, each in value.items()}
        return [self.marked(each) for each in value] if isinstance(value, list) else value

    def present_names(self, text: str) -> list[str]:
        """Return the names in a text."""
        return self._name.findall(text)

    def without_names(self, text: str) -> str:
        """Return a text in which a letter is in the place of each name."""
        return self._name.sub("x", text)

    def parse(self, text: str) -> Rendering:
        """Return the pieces of what a template has written. A mark without its partner, which a template leaves that cuts messages, is
        dropped.

        Raises:
            ConversationError: if the text is not Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # "\\ud800" is valid JSON, but not a character
            raise ConversationError("format", f"character {error.start} of the conversation is a lone surrogate") from error
        pieces: list[Piece] = []
        starts: list[int] = []
        replies: list[tuple[int, int]] = []
        place = length = 0
        for found in self._parts.finditer(text):
            between = text[place : found.start()]
            quoted, mark, name = found.groups()
            length += _append(pieces, between + (quoted or ""), is_special=False)
            if name:
                length += _append(pieces, self._present[name], is_special=True)
            if mark == REPLY_START:
                starts.append(length)
            elif mark == REPLY_END and starts:
                replies.append((starts.pop(), length))
            place = found.end()
        _append(pieces, text[place:], is_special=False)
        return Rendering(tuple(pieces), tuple(replies))


def _append(pieces: list[Piece], text: str, *, is_special: bool) -> int:
    """Append a piece, and return its length."""
    if text and not is_special and pieces and not pieces[-1].is_special:
        pieces[-1] = Piece(pieces[-1].text + text, False)
    elif text:
        pieces.append(Piece(text, is_special))
    return len(text)
