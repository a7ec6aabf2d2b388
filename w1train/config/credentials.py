"""Masking of passwords in URLs: a text that is written or shown has ``***`` in their place, and only the URLs in memory have them.

The functions find ``PROTOCOL://USER:PASSWORD@HOST`` and, in a query, the values of signatures, tokens, keys and passwords
(``X-Amz-Signature``, ``access_token``, ``sig``, ``api_key``, ...). They find a password with blanks, quotation marks or ``<>`` only if
these are percent-encoded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

MASK = "***"

# Every search takes time in proportion to the text: a pattern reads from ":/" to the next slash, or up to a bound.
_WORD = re.compile(r""":/[^\s"<>]+""")
# In the standard, the host begins after the last @ before the first / ? or #. The user may be an e-mail address; the colon may be
# percent-encoded, and one slash may be missing.
_PASSWORD = re.compile(r"(:/{1,2}(?:[^/?#:%]|%(?!3A))*+(?::|%3A))([^/?#]+)(?=@)", re.IGNORECASE)
# Passwords in which / ? or # are not encoded, up to 1024 characters. A text that looks like a port is not a password, unless only digits
# follow it. A path that contains another slash follows an empty port.
_PORT = r"(?:[0-9]{1,5}(?:[/?#']|\Z)(?![0-9]+@)|[?#']|\Z|/[^@/]{0,1024}/)"
_RAW_PASSWORD = re.compile(
    rf"(://(?:[^/?#:%\[\]]|%(?!3A))*+(?::|%3A))(?!{_PORT}|\*\*\*@)([^@]{{1,1024}}+(?:@[^/?#@]*+(?=@))*+)(?=@)", re.IGNORECASE
)
_SECRETS = "signature|token|secret|password|passwd|credential|passphrase|private[-_]?key|api[-_]?key|access[-_]?key|accesskeyid"
# A backslash ends a value: in JSON, it may belong to the quotation mark that follows.
_QUERY = re.compile(rf"([?&;#](?:[^=&;?#]*(?:{_SECRETS})|sig|sas|jwt|key|pwd|pass|auth|code)=)([^&;#'\\]+)", re.IGNORECASE)


def mask_urls(text: str) -> str:
    """Return the text with ``***`` for the secrets in its URLs. A masked text does not change again, and JSON stays valid."""
    return _WORD.sub(lambda word: _mask_word(word[0]), text)


def _mask_word(word: str) -> str:
    for pattern in _patterns(word):
        word = pattern.sub(rf"\1{MASK}", word)
    return word


def _patterns(word: str) -> list[re.Pattern[str]]:
    """Return the patterns that may find something in a word, in the order in which they are applied."""
    return [*((_PASSWORD, _RAW_PASSWORD) if "@" in word else ()), *((_QUERY,) if "=" in word else ())]


def mask_tree(value: Any) -> Any:
    """Return a tree of mappings and lists with :func:`mask_urls` applied to every string except the names of mappings."""
    if isinstance(value, str):
        return mask_urls(value)
    if isinstance(value, Mapping):
        return {name: mask_tree(child) for name, child in value.items()}
    return [mask_tree(child) for child in value] if isinstance(value, list) else value


def find_passwords(text: str) -> set[str]:
    """Return the passwords that :func:`mask_urls` would mask, both as written and decoded where they are percent-encoded."""
    found = _find(text)
    return (found | {unquote(password) for password in found}) - {MASK}


def is_masked(url: str) -> bool:
    """Tell whether :func:`mask_urls` has removed a URL's password, so that the URL cannot be opened."""
    return MASK in _find(url)


def _find(text: str) -> set[str]:
    found = set()
    for word in _WORD.findall(text):
        for pattern in _patterns(word):
            found |= {match[2] for match in pattern.finditer(word)}
            word = pattern.sub(rf"\1{MASK}", word)
    return found
