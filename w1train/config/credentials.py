"""Passwords inside of URLs: what is written or shown has ``***`` in their place, what is worked with has them.

Found are ``PROTOCOL://USER:PASSWORD@HOST`` and, in a query, the values of signatures, tokens, keys and passwords (``X-Amz-Signature``,
``access_token``, ``sig``, ``api_key``, ...). In a password, blanks, quotation marks and ``<>`` must be percent-encoded to be found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

MASK = "***"

_LONGEST = 2048
"""Characters of a word that is searched; a longer one is masked as a whole, for a search takes time like the square of its length."""
_WORD = re.compile(r"""[A-Za-z][A-Za-z0-9+.-]*://[^\s"<>]+""")
# First as the standard has it: the host begins behind the last @ before the first / ? or #. Then passwords in which these three are not
# encoded; what looks like a port is no password.
_USER = re.compile(r"(://[^\s/?#@:\[\]]*):([^/?#]+|(?!\d*(?:[/?#']|$))[^@]+)@")
_SECRETS = "signature|token|secret|password|passwd|credential|api[-_]?key|access[-_]?key|accesskeyid"
_QUERY = re.compile(rf"([?&;](?:[^=&;?#]*(?:{_SECRETS})|sig|key|pwd)=)([^&;#']+)", re.IGNORECASE)


def mask_urls(text: str) -> str:
    """The text with ``***`` for the passwords, signatures and tokens of the URLs in it. What is masked stays as it is."""
    return _WORD.sub(lambda word: _mask_word(word[0]), text) if "://" in text else text


def _mask_word(word: str) -> str:
    if len(word) > _LONGEST:
        return f"{word.partition('://')[0]}://{MASK}"
    return _QUERY.sub(rf"\1{MASK}", _USER.sub(rf"\1:{MASK}@", word))


def mask_tree(value: Any) -> Any:
    """A tree of mappings and lists with :func:`mask_urls` of each string in it (names of mappings stay)."""
    if isinstance(value, str):
        return mask_urls(value)
    if isinstance(value, Mapping):
        return {name: mask_tree(child) for name, child in value.items()}
    return [mask_tree(child) for child in value] if isinstance(value, list) else value


def find_passwords(text: str) -> set[str]:
    """What :func:`mask_urls` would mask, as it is written and, where it is percent-encoded, as it is meant."""
    found = set()
    for word in _short_words(text):
        found |= {match[2] for match in _USER.finditer(word)}
        found |= {match[2] for match in _QUERY.finditer(_USER.sub(rf"\1:{MASK}@", word))}
    return (found | {unquote(password) for password in found}) - {MASK}


def _short_words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text) if len(word) <= _LONGEST]


def is_masked(url: str) -> bool:
    """Whether a URL has lost its password by :func:`mask_urls`: it cannot be opened."""
    words = _short_words(url)
    return any(match[2] == MASK for word in words for pattern in (_USER, _QUERY) for match in pattern.finditer(word))
