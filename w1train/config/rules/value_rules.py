"""The rule of single values: each satisfies the constraint that its type in the schema carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from w1train.config.errors import Problem, show
from w1train.config.field_types import constraint_of, field_types, join, partial_class
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config

_UNSET = object()


def has_valid_values(config: Config) -> bool:
    """Tell whether each value satisfies its constraint, so that a rule may compute with it. Values that are unset count as valid."""
    return next(_constraints_rule(config), None) is None


def _constraints_rule(config: Config) -> Iterator[Problem]:
    for key, annotation, value in _values(Config, config, ""):
        constraint = constraint_of(annotation)
        # A range does not say whether null is valid: the type does.
        if constraint is not None and value is not None and value not in constraint:
            yield Problem(key, show(value), constraint.words(value))


def _values(annotation: Any, value: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the key, the type and the value of every leaf; fields that the conversion left unset are left out."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        set_fields = {name: child for name in field_types(annotation) if (child := getattr(value, name, _UNSET)) is not _UNSET}
        yield from _values_of_fields(annotation, set_fields, key)
    elif cls := partial_class(annotation):
        yield from _values_of_fields(cls, value, key)
    elif origin is dict:
        for name, child in value.items():
            yield from _values(arguments[1], child, join(key, name))
    elif origin is list:
        for index, child in enumerate(value):
            yield from _values(arguments[0], child, f"{key}[{index}]")
    else:
        yield key, annotation, value


def _values_of_fields(cls: Any, values: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any, Any]]:
    for name, value in values.items():
        yield from _values(field_types(cls)[name], value, join(key, name))


VALUE_RULES: tuple[Rule, ...] = (_constraints_rule,)
