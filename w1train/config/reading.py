"""The door for text files that somebody else may have written: sizes, nesting and numbers are bounded before anything is made of them.

Every JSON file that a command reads comes through here, and every YAML file's bytes do (``w1train.config.serialization`` and
``w1train.config.recipe_files`` parse them). Whoever hands us a file can then cost us a stated amount of memory and time, and an error.
"""

from __future__ import annotations

import json
import reprlib
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from w1train.config.errors import UserError

LARGEST_JSON = 16 << 20
"""The most bytes of a JSON file, and of a line of a JSONL file. The index of the largest published model has 9 MB."""
LARGEST_STATUS = 1 << 20
"""The most bytes of a small file that runs replace all the time: status.json, a heartbeat, the note of who holds a lock."""
DEEPEST = 64
"""Levels of lists and objects inside each other; the files that we know have ten."""
LONGEST_INTEGER = 40
"""Digits. Any integer of so many is a finite float; of a longer one that is not sure."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel, _short.maxdict, _short.maxlist = 2, 3, 3


class FileContentError(UserError):
    """A file that is too large, or not what its name promises; the message begins with its name."""


def shorten(value: object) -> str:
    """A value of somebody else's file for a message: its repr, of bounded length and without control characters."""
    return _short.repr(value)


def require_regular(path: Path) -> None:
    """Refuse what is no file: opening a pipe to which nobody writes would wait for ever, and a device has no end.

    Raises:
        FileContentError: it is a directory, a pipe or a device.
        OSError: there is nothing at the path.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise FileContentError(f"{path} is not a regular file")


def read_bounded(path: Path, largest: int) -> bytes:
    """The content of a regular file of at most ``largest`` bytes.

    Raises:
        FileContentError: the file is larger, or it is a directory, a pipe or a device.
        OSError: it cannot be opened or read.
    """
    require_regular(path)
    with path.open("rb") as file:
        # The size that the system tells is no bound: a file under /proc has size 0.
        content = file.read(largest + 1)
    if len(content) > largest:
        raise FileContentError(f"{path} is too large: it has more than {largest:,} bytes")
    return content


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, is nested deeper than DEEPEST, or has an integer of more than LONGEST_INTEGER digits.
    """
    try:
        value = json.loads(text, parse_int=_parse_integer)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    num_opened = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
    # Counting is far quicker than walking, and most texts have few lists and objects.
    if num_opened > DEEPEST:
        _check_depth(value)
    return value


def read_json_object(path: Path, what: str, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        what: what the file should be, for messages: "dataset manifest".

    Raises:
        FileContentError: the file is too large, not JSON, or has no object at its top.
        OSError: it cannot be opened or read.
    """
    return parse_json_object(read_bounded(path, largest), f"{path} is no {what}")


def parse_json_object(content: bytes, complaint: str) -> dict[str, Any]:
    """Parse a file's content that is a JSON object.

    Args:
        complaint: what is said of the file if it is no JSON object; the reason is added.

    Raises:
        FileContentError: the content is not JSON, or has no object at its top.
    """
    try:
        value = parse_json(content)
    except ValueError as error:
        raise FileContentError(f"{complaint}: {error}") from error
    if not isinstance(value, dict):
        raise FileContentError(f"{complaint}: it has no JSON object at its top but a {type(value).__name__}")
    return value


def is_number(value: object) -> bool:
    """Tell whether a value of a JSON text is a number; true and false are none, though Python counts them as integers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise ValueError(f"it has an integer of {len(digits)} digits, {digits[:20]}...")
    return int(digits)


def _check_depth(value: Any) -> None:
    """Check the depth one level after the other, without recursion."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(DEEPEST):
        level = [child for parent in level for child in _children(parent) if isinstance(child, list | dict)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def _children(parent: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return parent.values() if isinstance(parent, dict) else parent
