"""What somebody may put into a file that a command parses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

Content = bytes | Callable[[Path], None]
"""The bytes of a file, or what makes it at a path."""


def sparse(path: Path) -> None:
    """A file of a terabyte, none of which is on the disk: whoever reads it all ends by the machine's memory."""
    path.write_bytes(b"")
    os.truncate(path, 1 << 40)


def pipe(path: Path) -> None:
    """A pipe to which nobody writes: whoever opens it waits for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def directory(path: Path) -> None:
    """A directory under a file's name."""
    path.unlink(missing_ok=True)
    path.mkdir()


def put(path: Path, content: Content) -> None:
    """Replace a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


NOT_FILES: dict[str, Content] = {"terabyte": sparse, "pipe": pipe, "directory": directory}

NOT_JSON_OBJECTS: dict[str, Content] = {
    **NOT_FILES,
    "empty": b"",
    "cut": b'{"a": ',
    "list": b"[1, 2]",
    "number": b"1",
    "text": b'"{}"',
    "null": b"null",
    "deep lists": b"[" * 10_000 + b"]" * 10_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "shallow object of deep lists": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
    "integer of 5,000 digits": b'{"step": ' + b"9" * 5000 + b"}",
    "integer of 400 digits": b'{"step": ' + b"9" * 400 + b"}",
    "NUL": bytes(100),
    "not UTF-8": b'{"a": "\xff\xfe"}',
}

_LAUGHS = b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 10)) for level in range(1, 12)
)

NOT_CONFIGURATIONS: dict[str, Content] = {
    **NOT_FILES,
    "empty": b"",
    "list": b"[1, 2]",
    "scalar": b"5",
    "deep flow": b"[" * 10_000,
    "deep blocks": b"\n".join(b" " * level + b"a:" for level in range(1200)),
    "billion laughs": _LAUGHS,
    "list in itself": b"a: &a [*a]",
    "mapping in itself": b"a: &a {b: *a}",
    "decimal of 10,000 digits": b"model: {num_layers: " + b"9" * 10_000 + b"}",
    "hexadecimal of 10,000 digits": b"model: {num_layers: 0x" + b"f" * 10_000 + b"}",
    "binary of 20,000 digits": b"training: {seed: 0b" + b"1" * 20_000 + b"}",
    "sexagesimal": b"model: {num_layers: " + b":".join([b"1"] * 3000) + b"}",
    "a list as a key": b"? [a]\n: b",
    "a boolean that is none": b"a: !!bool x",
    "an integer that is none": b"a: !!int ''",
    "a time that is none": b"a: !!timestamp x",
    "a month that is none": b"a: 2001-99-99",
    "a Python object": b"a: !!python/object/apply:os.system [touch executed]",
    "wrong types": b"name: [1]\nmodel: 7\ndata: {tokenizer: {a: 1}}\nschedule: []\ntraining: {seed: [[]]}\nsampling: 2001-01-01",
    "unknown keys": b"\n".join(b"key%d: {a: %d}" % (number, number) for number in range(300)),
    "a key that steers the terminal": b'"\\e[2J\\e]0;owned\\a": 1',
    "NUL": b"name: \0",
    "not UTF-8": b"name: \xff\xfe\xff",
    "not a number": b"model: {rope_base: .nan, norm_epsilon: 1e999999}",
    "text where numbers are": b"model: {num_layers: many, hidden_size: '32'}",
}
