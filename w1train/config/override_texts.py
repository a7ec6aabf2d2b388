"""Overrides that are given as values of Python, as the text that the command line takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from w1train.config.errors import Problem

_VALID = "text, a path, an integer, a float, a bool, None, or a list or dict of these"


def override_texts(overrides: Mapping[str, Any]) -> tuple[list[str], list[Problem]]:
    """Return an override for each value, and a problem for each value that has no text.

    ``{"training": {"seed": 1}}`` is the same as ``{"training.seed": 1}``, and ``{"~KEY": None}`` goes back to a default.
    """
    texts, problems = [], []
    for key, value in _flat(overrides):
        try:
            texts.append(_override(key, value))
        except TypeError as error:
            problems.append(Problem(str(key), str(error), _VALID))
    return texts, problems


def _flat(overrides: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the key and value of each override. A mapping is merged into the configuration, key by key."""
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{key}.{name}", item) for name, item in _flat(value))
        else:
            yield key, value


def _override(key: Any, value: Any) -> str:
    if not isinstance(key, str) or "=" in key:
        raise TypeError(f"the key {key!r}, which is not a name such as training.seed")
    return key if key.startswith("~") and value is None else f"{key}={_text(value)}"


def _text(value: Any) -> str:
    """Return a value in the grammar of Hydra's overrides."""
    value = value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            return QuotedString(text=value, quote=Quote.single).with_quotes()
        case os.PathLike():
            return _text(os.fspath(value))
        case list() | tuple():
            return f"[{','.join(map(_text, value))}]"
        case Mapping():
            return "{" + ",".join(f"{name}:{_text(item)}" for name, item in value.items()) + "}"
    raise TypeError(f"{type(value).__name__} {value!r:.60}")
