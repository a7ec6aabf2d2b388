"""Plain Python values as JSON, and back with the same values and types: step counts and parameter groups of a checkpoint.

JSON has no tuples, and its keys are texts. Tuples, and dictionaries with other keys, are written as objects with one key that begins with a
dollar sign.
"""

from __future__ import annotations

from typing import Any

from w1train.config.reading import shorten

_TUPLE, _ITEMS = "$tuple", "$items"
_SCALARS = (bool, int, float, str)
_LARGEST = 1e100
"""The largest number of an optimizer that is accepted. The numbers of real optimizers are far smaller, and fit into floats."""


def encode(value: Any) -> Any:
    """Return a copy of a value that ``json.dumps`` writes without loss.

    Raises:
        TypeError: the value, or a value inside it, is neither None, bool, int, float or str nor a list, tuple or dict of such values.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [encode(item) for item in value]
    if type(value) is tuple:
        return {_TUPLE: [encode(item) for item in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {_ITEMS: [[encode(key), encode(item)] for key, item in value.items()]}
    raise TypeError(f"a checkpoint cannot hold a value of type {type(value).__name__}")


def decode(value: Any) -> Any:
    """Return the value that ``encode`` has encoded.

    Raises:
        ValueError: ``encode`` does not return such a value.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_TUPLE}:
        return tuple(_list(value[_TUPLE]))
    if set(value) == {_ITEMS}:
        pairs = _list(value[_ITEMS])
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], (str, int, float)) for pair in pairs):
            raise ValueError(f"{_ITEMS} needs pairs of a key and a value")
        return dict(pairs)
    if any(key.startswith("$") for key in value):
        raise ValueError(f"the key {shorten(next(key for key in value if key.startswith('$')))} is not known")
    return {key: decode(item) for key, item in value.items()}


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"a list was expected, found {type(value).__name__}")
    return [decode(item) for item in value]


def first_unlike(expected: Any, found: Any, name: str) -> str | None:
    """Describe the first place where a value lacks a scalar of an example or has a value of another kind, or return None.

    Numbers of all types count as one kind. Objects of the example that are neither scalars nor containers are not compared: a parameter
    group holds its parameters, which are not saved with it.

    Args:
        expected: the example. The first item of a list is the example of all its items.
        name: the name of the value in the description.
    """
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return f"{name} is {shorten(found)}, expected a table"
        missing = [key for key, example in expected.items() if key not in found and isinstance(example, (*_SCALARS, dict, list, tuple))]
        if missing:
            return f"{name} lacks {missing[0]}"
        parts = ((example, found[key], f"{name}.{key}") for key, example in expected.items() if key in found)
        return next((problem for part in parts if (problem := first_unlike(*part))), None)
    if isinstance(expected, (list, tuple)):
        if not isinstance(found, type(expected)):
            return f"{name} is {shorten(found)}, expected a {type(expected).__name__}"
        items = ((expected[0], item, f"{name}[{number}]") for number, item in enumerate(found)) if expected else ()
        return next((problem for part in items if (problem := first_unlike(*part))), None)
    if not isinstance(expected, _SCALARS):
        return None
    if isinstance(expected, str):
        is_alike = isinstance(found, str)
    else:
        is_alike = isinstance(found, (bool, int, float)) and abs(found) < _LARGEST
    return None if is_alike else f"{name} is {shorten(found)}, expected {shorten(expected)}"
