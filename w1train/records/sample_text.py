"""Generated text for people: masks made visible, length kept in bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# However the tokenizer spells its mask token.
_MASK = re.compile(r"<\|?mask\|?>|\[mask\]", re.IGNORECASE)

MASK_SYMBOL = "\u2591"
"""A light shade block stands for each token that is still masked."""


def split_masks(text: str) -> Iterator[tuple[str, int]]:
    """The text in order as (piece, 0) for words and ("", n) for n masks in a row."""
    position = 0
    num_masks = 0
    for match in _MASK.finditer(text):
        if between := text[position : match.start()]:
            if num_masks:
                yield "", num_masks
            num_masks = 0
            yield between, 0
        num_masks += 1
        position = match.end()
    if num_masks:
        yield "", num_masks
    if rest := text[position:]:
        yield rest, 0


def continuation(sample: Mapping[str, Any]) -> str:
    """What a record of samples.jsonl adds to its prompt."""
    return sample["text"].removeprefix(sample["prompt"])


def shorten(text: str, max_characters: int) -> str:
    """At most so many characters, masks counted as one each; "..." says that there was more."""
    pieces: list[str] = []
    left = max_characters
    for piece, num_masks in split_masks(text):
        size = num_masks or len(piece)
        pieces.append("<|mask|>" * min(num_masks, left) if num_masks else piece[:left])
        if size > left:
            return "".join(pieces) + "..."
        left -= size
    return "".join(pieces)


def visible_masks(text: str) -> str:
    """The text with one :data:`MASK_SYMBOL` for each mask token."""
    return "".join(MASK_SYMBOL * num_masks or piece for piece, num_masks in split_masks(text))
