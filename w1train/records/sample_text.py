"""Generated text for people: with visible masks, and shortened."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# The spellings of the mask token by known tokenizers.
_MASK = re.compile(r"<\|?mask\|?>|\[mask\]", re.IGNORECASE)

MASK_SYMBOL = "\u2591"
"""The light shade block that stands for each token that is still masked."""


def split_masks(text: str) -> Iterator[tuple[str, int]]:
    """Yield the pieces of a text in order: (piece, 0) for words, and ("", n) for n masks in a row."""
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
    """Return the text that the model added to the prompt of a record of samples.jsonl."""
    return sample["text"].removeprefix(sample["prompt"])


def shorten(text: str, max_characters: int) -> str:
    """Return the first characters of a text, a mask counted as one, with "..." behind them if the text has more."""
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
    """Return the text with one :data:`MASK_SYMBOL` in place of each mask token."""
    return "".join(MASK_SYMBOL * num_masks or piece for piece, num_masks in split_masks(text))
