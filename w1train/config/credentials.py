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

# Every search takes time in proportion to the text: what a pattern reads behind a ":/" ends at the next slash or within a bound.
_WORD = re.compile(r""":/[^\s"<>]+""")
# As the standard has it: the host begins behind the last @ before the first / ? or #. The user may be an e-mail address; the colon may be
# percent-encoded, and one slash may be missing.
_PASSWORD = re.compile(r"(:/{1,2}(?:[^/?#:%]|%(?!3A))*+(?::|%3A))([^/?#]+)(?=@)", re.IGNORECASE)
# Passwords in which / ? or # are not encoded, up to 1024 characters. What looks like a port is no password, unless only digits follow; an
# empty port is followed by a path, which has another slash.
_PORT = r"(?:[0-9]{1,5}(?:[/?#']|\Z)(?![0-9]+@)|[?#']|\Z|/[^@/]{0,1024}/)"
_RAW_PASSWORD = re.compile(
    rf"(://(?:[^/?#:%\[\]]|%(?!3A))*+(?::|%3A))(?!{_PORT}|\*\*\*@)([^@]{{1,1024}}+(?:@[^/?#@]*+(?=@))*+)(?=@)", re.IGNORECASE
)
_SECRETS = "signature|token|secret|password|passwd|credential|passphrase|private[-_]?key|api[-_]?key|access[-_]?key|accesskeyid"
# A backslash ends a value: in JSON, it may belong to the quotation mark behind it.
_QUERY = re.compile(rf"([?&;#](?:[^=&;?#]*(?:{_SECRETS})|sig|sas|jwt|key|pwd|pass|auth|code)=)([^&;#'\\]+)", re.IGNORECASE)


def mask_urls(text: str) -> str:
    """The text with ``***`` for the passwords, signatures and tokens in its URLs. A masked text stays as it is, and JSON stays valid."""
    return _WORD.sub(lambda word: _mask_word(word[0]), text)


def _mask_word(word: str) -> str:
    for pattern in _patterns(word):
        word = pattern.sub(rf"\1{MASK}", word)
    return word


def _patterns(word: str) -> list[re.Pattern[str]]:
    """The patterns that may find something in a word, in the order in which they are applied."""
    return [*((_PASSWORD, _RAW_PASSWORD) if "@" in word else ()), *((_QUERY,) if "=" in word else ())]


def mask_tree(value: Any) -> Any:
    """A tree of mappings and lists with :func:`mask_urls` of each string in it (names of mappings stay)."""
    if isinstance(value, str):
        return mask_urls(value)
    if isinstance(value, Mapping):
        return {name: mask_tree(child) for name, child in value.items()}
    return [mask_tree(child) for child in value] if isinstance(value, list) else value


def find_passwords(text: str) -> set[str]:
    """Return what :func:`mask_urls` would mask, as it is written and, where it is percent-encoded, as it is meant."""
    found = _find(text)
    return (found | {unquote(password) for password in found}) - {MASK}


def is_masked(url: str) -> bool:
    """Tell whether a URL has lost its password by :func:`mask_urls`: it cannot be opened."""
    return MASK in _find(url)


def _find(text: str) -> set[str]:
    found = set()
    for word in _WORD.findall(text):
        for pattern in _patterns(word):
            found |= {match[2] for match in pattern.finditer(word)}
            word = pattern.sub(rf"\1{MASK}", word)
    return found
