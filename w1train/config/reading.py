"""Reading of text files that somebody else may have written, with bounds on their size, their nesting and their numbers.

Commands read every JSON file, and the bytes of every YAML file, by these functions (``w1train.config.serialization`` and
``w1train.config.recipe_files`` parse the YAML). A hostile file can then cost only a limited amount of memory and time before it is refused.
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
"""Most bytes of a JSON file or of a line of a JSONL file. The index of the largest published model has 9 MB."""
LARGEST_STATUS = 1 << 20
"""Most bytes of a small file that runs replace often: status.json, a heartbeat, the owner of a lock."""
DEEPEST = 64
"""Most levels of nested lists and objects. Known files have ten levels."""
LONGEST_INTEGER = 40
"""Most digits of an integer. Every integer of this length is a finite float; an integer of more than 308 digits may not be."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel, _short.maxdict, _short.maxlist = 2, 3, 3


class FileContentError(UserError):
    """A file that is too large or has the wrong content. The message begins with the file's name."""


def shorten(value: object) -> str:
    """Return the repr of a value from somebody else's file for a message: of bounded length and without control characters."""
    return _short.repr(value)


def require_regular(path: Path) -> None:
    """Refuse paths that are not regular files: to open a pipe without a writer would wait forever, and a device has no end.

    Raises:
        FileContentError: the path is a directory, a pipe or a device.
        OSError: the path does not exist.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise FileContentError(f"{path} is not a regular file")


def read_bounded(path: Path, largest: int) -> bytes:
    """Return the content of a regular file of at most ``largest`` bytes.

    Raises:
        FileContentError: the file is larger, or the path is a directory, a pipe or a device.
        OSError: the file cannot be opened or read; the error has its path.
    """
    require_regular(path)
    # The size that the system reports is no bound: a file under /proc has size 0.
    content = read_start(path, largest + 1)
    if len(content) > largest:
        raise FileContentError(f"{path} is too large: it has more than {largest:,} bytes")
    return content


def read_start(path: Path, num_bytes: int) -> bytes:
    """Return the first ``num_bytes`` bytes of a file, or all of a shorter file.

    Raises:
        OSError: the file cannot be opened or read; the error has its path.
    """
    with path.open("rb") as file:
        try:
            return file.read(num_bytes)
        except OSError as error:
            # The error of a read does not tell which file it is about. errors_named of w1train.runtime is above this package.
            error.filename = str(path)
            raise


def parse_json(text: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is not JSON, is nested deeper than DEEPEST, or has an integer of more than LONGEST_INTEGER digits.
    """
    try:
        value = json.loads(text, parse_int=_parse_integer)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    num_opened = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
    # Counting brackets is much faster than a walk, and most texts have few lists and objects.
    if num_opened > DEEPEST:
        _check_depth(value)
    return value


def read_json_object(path: Path, what: str, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Args:
        what: what the file should be, in words for messages: "dataset manifest".

    Raises:
        FileContentError: the file is too large or not JSON, or its top is not an object.
        OSError: the file cannot be opened or read.
    """
    return parse_json_object(read_bounded(path, largest), f"{path} is no {what}")


def parse_json_object(content: bytes, complaint: str) -> dict[str, Any]:
    """Parse the content of a file as a JSON object.

    Args:
        complaint: the start of the message if the content is no JSON object; the reason follows.

    Raises:
        FileContentError: the content is not JSON, or its top is not an object.
    """
    try:
        value = parse_json(content)
    except ValueError as error:
        raise FileContentError(f"{complaint}: {error}") from error
    if not isinstance(value, dict):
        raise FileContentError(f"{complaint}: it has no JSON object at its top but a {type(value).__name__}")
    return value


def is_number(value: object) -> bool:
    """Tell whether a value of a JSON text is a number. Python counts true and false as integers; this function does not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise ValueError(f"it has an integer of {len(digits)} digits, {digits[:20]}...")
    return int(digits)


def _check_depth(value: Any) -> None:
    """Check the depth level by level, without recursion."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(DEEPEST):
        level = [child for parent in level for child in _children(parent) if isinstance(child, list | dict)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def _children(parent: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return parent.values() if isinstance(parent, dict) else parent
