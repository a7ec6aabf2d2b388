"""The growth of a text in the steps of a tokenizer.json.

Replacements by longer texts multiply each other: ten replacements by a hundred characters would make 10^20 characters of one, for which the
library would take memory until the process is killed.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import Any

from w1train.config.reading import shorten

MOST_GROWTH = 10_000
"""The most characters that the steps of a tokenizer.json may make of one character, by a count that assumes the worst case of each step.
The steps of most published tokenizers make from four to some thousand. Those of ALBERT and XLNet, which are Unigram models and cannot
be imported, make 15,552."""
LARGEST_CHARACTER_MAP = 512 << 10
"""The most bytes of SentencePiece's table of characters. The table of most models (nmt_nfkc) has 240 kB."""
LONGEST_REPLACEMENT = 64
"""The most bytes by which the table may replace a character. The longest replacement in Unicode (of U+FDFA) has 33."""
_SIZE_BYTES = 4

_Step = dict[str, Any]


def largest_growth(content: dict[str, Any]) -> tuple[int, int]:
    """Return the most characters that (encoding, decoding) can make of one character.

    Args:
        content: the parsed content of a tokenizer.json.

    Raises:
        ValueError: if a step has an unknown type or invalid parameters, or the growth is above MOST_GROWTH.
    """
    encoding = _growth_of(content, "normalizer", "pre_tokenizer", "post_processor")
    decoding = _growth_of(content, "decoder")
    if (growth := max(encoding, decoding)) > MOST_GROWTH:
        raise ValueError(f"its steps replace a character by as many as {growth:.3g}; at most {MOST_GROWTH} are supported")
    return encoding, decoding


def _growth_of(content: dict[str, Any], *kinds: str) -> int:
    growth = 1
    for kind in kinds:
        for step in _steps(content.get(kind), kind):
            growth = min(growth * _KNOWN[kind][step["type"]](step), 1 << 64)  # the product of a million factors would take long to compute
    return growth


def _steps(step: Any, kind: str) -> Iterator[_Step]:
    """Yield all tokenizer steps of one kind. Steps inside nested sequences are included. w1train.config.reading limits
    the depth of nesting."""
    if step is None:
        return
    # For a step without a type, the library would take the first type that has the step's parameters.
    name = step.get("type") if isinstance(step, dict) else None
    if name == "Sequence":
        parts = step.get(_PARTS[kind])
        if not isinstance(parts, list):
            raise ValueError(f"its {kind} is a Sequence without {_PARTS[kind]}")
        for part in parts:
            yield from _steps(part, kind)
    elif isinstance(name, str) and name in _KNOWN[kind]:
        yield step
    else:
        raise ValueError(f"its {kind} is of type {shorten(name)}; supported are {', '.join(sorted([*_KNOWN[kind], 'Sequence']))}")


def _fixed(growth: int) -> Callable[[_Step], int]:
    return lambda _: growth


def _of_replacement(step: _Step) -> int:
    """Return the growth by a replacement: a regular expression that matches the empty text inserts the content at each character."""
    return 1 + len(_text(step, "content"))


def _of_prefix(step: _Step) -> int:
    return 1 + len(_text(step, "prepend"))


def _of_template(step: _Step) -> int:
    """Return the growth by a template, which may contain the text more than once; its special tokens are not counted."""
    parts = step.get("single")
    return max(1, sum("Sequence" in part for part in parts if isinstance(part, dict))) if isinstance(parts, list) else 1


def _of_character_map(step: _Step) -> int:
    """Return the growth by SentencePiece's table, which holds the size of a trie, the trie, and the replacements, each followed by a zero.

    The library takes as much memory as the stated size of the trie, and ends the process if there is not enough.
    """
    encoded = step.get("precompiled_charsmap")
    if encoded is None:
        return 1
    if not isinstance(encoded, str) or len(encoded) > 4 * LARGEST_CHARACTER_MAP // 3 + _SIZE_BYTES:
        raise ValueError(f"its precompiled_charsmap is not a text, or has more than {LARGEST_CHARACTER_MAP} bytes")
    table = base64.b64decode(encoded, validate=True)
    size = int.from_bytes(table[:_SIZE_BYTES], "little")
    if size % _SIZE_BYTES or not 0 < size <= len(table) - _SIZE_BYTES:
        raise ValueError(f"its precompiled_charsmap is damaged: it claims a trie of {size} bytes, and has {len(table)}")
    replacements = table[_SIZE_BYTES + size :].split(b"\0")
    if max(map(len, replacements)) > LONGEST_REPLACEMENT:
        raise ValueError(f"its precompiled_charsmap replaces a character by more than {LONGEST_REPLACEMENT} bytes")
    return max(1, *(len(replacement.decode("utf-8")) for replacement in replacements))


def _text(step: _Step, name: str) -> str:
    value = step.get(name)
    if not isinstance(value, str):
        raise ValueError(f"its {step['type']} has no {name} that is a text")
    return value


_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors", "decoder": "decoders"}
"""The key of the list of steps in a Sequence of each kind."""
_KEEPS = _fixed(1)
_KNOWN: dict[str, dict[str, Callable[[_Step], int]]] = {
    "normalizer": {
        # The numbers are for the longest replacements in Unicode.
        "BertNormalizer": _fixed(4 * 3 * 2),
        "NFC": _fixed(3),
        "NFD": _fixed(4),
        "NFKC": _fixed(18),
        "NFKD": _fixed(18),
        "Lowercase": _fixed(2),
        "Nmt": _KEEPS,
        "Strip": _KEEPS,
        "StripAccents": _KEEPS,
        "Precompiled": _of_character_map,
        "Prepend": _of_prefix,
        "Replace": _of_replacement,
        # Each byte becomes a character, most of which have two bytes, so a second step of this type doubles the text again.
        "ByteLevel": _fixed(4),
    },
    "pre_tokenizer": {
        **dict.fromkeys(("BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength", "Punctuation", "Split"), _KEEPS),
        **dict.fromkeys(("UnicodeScripts", "Whitespace", "WhitespaceSplit"), _KEEPS),
        "ByteLevel": _fixed(5),  # it may add a space before the text
        "Metaspace": _fixed(2),
    },
    "post_processor": {
        **dict.fromkeys(("BertProcessing", "ByteLevel", "RobertaProcessing"), _KEEPS),
        "TemplateProcessing": _of_template,
    },
    "decoder": {
        **dict.fromkeys(("ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Strip"), _KEEPS),
        # These steps replace a text of the file, which may be empty, by a space.
        **dict.fromkeys(("BPEDecoder", "CTC", "WordPiece"), _fixed(2)),
        "Replace": _of_replacement,
    },
}
"""For each type of step, by its name in the file, the most characters that it makes of one."""
