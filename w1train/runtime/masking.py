"""Masks for the passwords of URLs in everything that a process shows: its log, exceptions of libraries, and printed text.

Most texts quote the whole URL, and the password is found by the URL's form. Some storage libraries quote a piece of the URL. The passwords
of the command line, the environment and the configuration are therefore remembered, and found anywhere in a text.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from w1train.config.credentials import MASK, find_passwords, mask_urls

_LEAST_ALONE = 8
"""The fewest characters of a password that is masked where it stands alone. A shorter password may be a part of any word."""
_PLAIN_WORD = re.compile("[A-Za-z][a-z]{0,14}")
"""A password that is not masked where it stands alone: the "training" of postgres://user:training@host is in many messages."""
_passwords: set[str] = set()


def remember_passwords(texts: Iterable[str]) -> None:
    """Make :func:`mask` know the passwords of the URLs in these texts from now on."""
    for text in texts:
        _passwords.update(find_passwords(text))


def mask(text: str) -> str:
    """Return the text without passwords of URLs, and without remembered passwords. Where a remembered password stands alone, it is masked
    if it has at least 8 characters and is not a plain word (up to 15 letters, of which only the first may be a capital); between ``:`` and
    ``@`` it is always masked."""
    text = mask_urls(text)
    # The longest password first: a shorter one may be its beginning.
    for password in sorted(_passwords, key=len, reverse=True):
        text = text.replace(password, MASK) if _is_masked_alone(password) else text.replace(f":{password}@", f":{MASK}@")
    return text


def _is_masked_alone(password: str) -> bool:
    return len(password) >= _LEAST_ALONE and not _PLAIN_WORD.fullmatch(password)


def mask_output() -> None:
    """Remember the passwords of the command line and the environment, and mask what this process writes to stdout and stderr from now on.
    Commands call this first (command.py), because a log handler keeps the stream that it has found."""
    remember_passwords([*sys.argv, *os.environ.values()])
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _MaskedStream):
            setattr(sys, name, _MaskedStream(stream))


def unmasked(stream: TextIO) -> TextIO:
    """Return the stream without its mask. It is for text that a model has generated, and for JSON whose texts are masked already: a mask
    over the whole could end inside a number or an escape."""
    return stream._stream if isinstance(stream, _MaskedStream) else stream


class _MaskedStream:
    """A text stream whose ``write`` masks passwords."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(mask(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __iter__(self) -> Any:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
