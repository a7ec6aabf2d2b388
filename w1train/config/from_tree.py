"""Conversion of a plain tree (mappings, lists, scalars) to the configuration's dataclasses, which reports every mistake.

Hydra and OmegaConf do not suffice: for plain YAML they accept any key, and ``key=abc`` for an integer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from w1train.config.errors import MOST_PROBLEMS, NOT_GIVEN, Problem, closest, listing, show
from w1train.config.field_types import describe_type, field_types, is_optional, is_required, join, partial_class, scalar_type
from w1train.config.schema import Config
from w1train.config.synonyms import hint_for, value_for

# Larger floats do not stand for a single integer: 1e23 is 99999999999999991611392.
_LARGEST_EXACT_FLOAT = 2**53
_TYPE_NAMES = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list", dict: "a mapping"}
_INVALID: Any = object()


@dataclasses.dataclass(slots=True)
class Conversion:
    """The outcome of converting one tree."""

    config: Config
    """Fields that could not be converted are *unset*: reading one raises AttributeError, and ``w1train.config.rules.validate`` then leaves
    out the rule that reads it."""
    problems: list[Problem]
    complete: bool
    """This flag tells whether every field is set."""


def config_from_tree(
    tree: Mapping[Any, Any], unknown_sections: frozenset[str] = frozenset(), typed: Mapping[str, str] | None = None
) -> Conversion:
    """Convert a plain tree to a ``Config``.

    Args:
        unknown_sections: top-level keys whose values are unknown, because the recipe that sets them was not found. Keys that are
            missing there are not reported and get no default.
        typed: the text that the user typed for numbers and booleans, by key; for suggestions.
    """
    converter = _Converter(unknown_sections, typed or {}, _stage_names(tree))
    config = converter.dataclass(Config, tree, "")
    return Conversion(config, converter.problems, complete=not converter.problems and not unknown_sections)


class _Converter:
    """A walk over the tree and the types, which collects the problems."""

    def __init__(self, unknown_sections: frozenset[str], typed: Mapping[str, str], stages: Sequence[str]):
        self.unknown_sections, self.typed, self.stages = unknown_sections, typed, stages
        self.problems: list[Problem] = []

    def value(self, annotation: Any, value: Any, key: str) -> Any:
        """Return the converted value, or ``_INVALID`` after noting the problem."""
        origin = get_origin(annotation)
        if dataclasses.is_dataclass(annotation) and isinstance(value, Mapping):
            return self.dataclass(annotation, value, key)
        if (cls := partial_class(annotation)) and isinstance(value, Mapping):
            return self.some_fields(cls, value, key)
        if origin is list and isinstance(value, list):
            items = [self.value(get_args(annotation)[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
            return _INVALID if any(item is _INVALID for item in items) else items
        if origin is dict and isinstance(value, Mapping):
            return self.mapping(get_args(annotation)[1], value, key)
        converted = _convert_scalar(annotation, value)
        if converted is _INVALID:
            self.problems.append(_wrong_type(annotation, value, key, self.typed.get(key)))
        return converted

    def dataclass(self, cls: Any, tree: Mapping[Any, Any], key: str) -> Any:
        """Return an instance of ``cls`` in which the fields that could not be converted are unset."""
        annotations = field_types(cls)
        result = object.__new__(cls)
        for field in dataclasses.fields(cls):
            full_key, annotation = join(key, field.name), annotations[field.name]
            value = self.value(annotation, tree[field.name], full_key) if field.name in tree else self.absent(field, annotation, full_key)
            if value is not _INVALID:
                setattr(result, field.name, value)
        for name in tree:
            if name not in annotations:
                self.unknown(name, tree[name], key, annotations)
        return result

    def some_fields(self, cls: Any, tree: Mapping[Any, Any], key: str) -> dict[str, Any]:
        """Convert the fields of ``cls`` that the tree has; fields that could not be converted are left out."""
        annotations = field_types(cls)
        for name in tree.keys() - annotations.keys():
            self.unknown(name, tree[name], key, annotations)
        found = {name: self.value(annotations[name], tree[name], join(key, name)) for name in annotations if name in tree}
        return {name: value for name, value in found.items() if value is not _INVALID}

    def unknown(self, name: Any, value: Any, parent: str, siblings: Mapping[str, Any]) -> None:
        """Note a problem for each leaf under an unknown key, so that the full key of every wrong override is named."""
        where = f"a key of {parent}" if parent else "a top-level key"
        for path, leaf in _leaves(str(name), value):
            full_key = join(parent, path)
            if len(self.problems) < MOST_PROBLEMS:
                found = f"an unknown key (value {show(leaf)})"
                intended = hint_for(full_key, _as_typed(leaf), self.stages, whole=_is_alike(parent, path, siblings))
                intended = intended or _intended(parent, path, siblings)
                self.problems.append(Problem(full_key, found, f"{where}: {listing(siblings)}", intended))
            else:
                # Problems that are not shown are only counted: the search for the intended key takes milliseconds.
                self.problems.append(Problem(full_key, "an unknown key", where))

    def absent(self, field: dataclasses.Field[Any], annotation: Any, key: str) -> Any:
        """Return the default of a field that the tree does not have, or note that the field is missing."""
        if key.partition(".")[0] in self.unknown_sections:
            # An unknown section becomes an object without fields, so that keys which the user sets in it are still checked.
            return self.dataclass(annotation, {}, key) if dataclasses.is_dataclass(annotation) else _INVALID
        if is_required(field):
            self.problems.append(_missing(annotation, key))
            return _INVALID
        return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()

    def mapping(self, annotation: Any, tree: Mapping[Any, Any], key: str) -> Any:
        result = {}
        for name, value in tree.items():
            if isinstance(name, str):
                result[name] = self.value(annotation, value, join(key, name))
            else:
                found = f"the name {show(name)}, {_type_name(name)}"
                self.problems.append(Problem(key, found, "names that are strings", f"in quotes: '{show(name)}'"))
        valid = {name: value for name, value in result.items() if value is not _INVALID}
        return _INVALID if tree and not valid else valid


def _convert_scalar(annotation: Any, value: Any) -> Any:
    """Return a scalar or a choice, or ``_INVALID`` if the value has another type. Booleans and strings are not taken for numbers."""
    if value is None:
        return None if is_optional(annotation) else _INVALID
    kind = scalar_type(annotation)
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else _INVALID
    if kind is int and isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_EXACT_FLOAT:
        return int(value)
    if kind is float and type(value) is int:
        return float(value) if abs(value) <= _LARGEST_EXACT_FLOAT else _INVALID
    return value if type(value) is kind else _INVALID


def _wrong_type(annotation: Any, value: Any, key: str, typed: str | None) -> Problem:
    found = "null" if value is None else f"{show(value)}, {_type_name(value)}"
    return Problem(key, found, describe_type(annotation) + _too_large(annotation, value), _repair(annotation, value, key, typed))


def _too_large(annotation: Any, value: Any) -> str:
    """Say that a number is too large to be converted exactly between integer and float, if this is the reason."""
    if {scalar_type(annotation), type(value)} != {int, float} or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return " (this number is too large)" if abs(value) > _LARGEST_EXACT_FLOAT else ""


def _repair(annotation: Any, value: Any, key: str, typed: str | None) -> str | None:
    """Suggest how a value of the wrong type could be written instead."""
    # Overrides cannot set a single item of a list.
    prefix = "" if key.endswith("]") else f"{key}="
    kind = scalar_type(annotation)
    if isinstance(value, Mapping):
        return next((hint for path, leaf in _leaves(key, value) if (hint := hint_for(path, _as_typed(leaf), whole=True))), None)
    if (right := value_for(key, value)) is not None:
        return f"did you mean {right}?"
    if isinstance(value, str):
        if get_origin(kind) is Literal:
            match = closest(value, get_args(kind))
            return f"did you mean {match}?" if match else None
        if kind in (int, float) and _reads_as_number(value):
            return f"without quotes: {prefix}{value}"
        if kind is bool and value.lower() in ("yes", "on", "no", "off"):
            return f"{prefix}{'true' if value.lower() in ('yes', 'on') else 'false'}"
    if kind is str and isinstance(value, int | float):
        # The value alone does not tell what was typed: 1e3 has become 1000.0, and yes has become true. Integers are unchanged.
        text = show(value) if typed is None and type(value) is int else typed
        return f"""in quotes; on a command line: {prefix}'"{text}"'""" if text and prefix else "the text in quotes"
    if kind is int and isinstance(value, float) and abs(value) < _LARGEST_EXACT_FLOAT:
        return f"{prefix}{round(value)}"
    return None


def _missing(annotation: Any, key: str) -> Problem:
    if not dataclasses.is_dataclass(annotation):
        return Problem(key, NOT_GIVEN, describe_type(annotation))
    required = [field.name for field in dataclasses.fields(annotation) if is_required(field)]
    return Problem(key, NOT_GIVEN, f"a mapping with at least the keys {listing(required)}")


def _is_alike(parent: str, path: str, siblings: Mapping[str, Any]) -> bool:
    """Tell whether a section has a key that is written like an unknown key of it, and is therefore more probable than a synonym of its last
    part: sampling.steps is sampling.num_steps."""
    return parent != "" and closest(path, siblings, likeness=0.7) is not None


def _intended(parent: str, path: str, siblings: Mapping[str, Any]) -> str | None:
    """Return a question that names the known key which an unknown key was probably meant to be."""
    name, _, rest = path.partition(".")
    match = closest(name, siblings)
    if match and rest and dataclasses.is_dataclass(siblings[match]):
        inner = field_types(siblings[match])
        inner_match = closest(rest, inner)
        if inner_match is None:
            return f"did you mean {join(parent, match)}? Its keys: {listing(inner)}"
        match = f"{match}.{inner_match}"
    if match:
        return f"did you mean {join(parent, match)}?"
    elsewhere = _keys_named(path.rpartition(".")[2])
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else None


def _stage_names(tree: Mapping[Any, Any]) -> list[str]:
    """Return the names of the stages of a tree that may have any values."""
    schedule = tree.get("schedule")
    stages = schedule.get("stages") if isinstance(schedule, Mapping) else None
    return [str(name) for name in stages] if isinstance(stages, Mapping) else []


@functools.cache
def all_keys() -> dict[str, list[str]]:
    """Return the full keys of the tree by their last part; a stage's keys are under ``schedule.stages.NAME``."""
    keys: dict[str, list[str]] = {}

    def visit(cls: Any, prefix: str) -> None:
        for name, annotation in field_types(cls).items():
            key = join(prefix, name)
            keys.setdefault(name, []).append(key)
            if dataclasses.is_dataclass(annotation):
                visit(annotation, key)
            elif get_origin(annotation) is dict and dataclasses.is_dataclass(get_args(annotation)[1]):
                visit(get_args(annotation)[1], f"{key}.NAME")

    visit(Config, "")
    return keys


def _keys_named(name: str) -> list[str]:
    match = closest(name, all_keys())
    return all_keys()[match] if match else []


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, child in value.items():
            yield from _leaves(f"{path}.{name}", child)
    else:
        yield path, value


def _as_typed(value: Any) -> str:
    """Return a value for a suggestion: a plain word without quotes."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w./-]{1,80}", value) else show(value)


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _type_name(value: object) -> str:
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")
