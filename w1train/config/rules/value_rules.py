"""The rule of single values: each satisfies the constraint that its type in the schema carries."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from w1train.config.constraints import Constraint
from w1train.config.errors import Problem, show
from w1train.config.field_types import constraint_of, field_types, join, partial_class
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config

_UNSET = object()


def has_valid_values(config: Config) -> bool:
    """Tell whether each value satisfies its constraint, so that a rule may compute with it. Values that are unset count as valid."""
    return next(_constraints_rule(config), None) is None


def _constraints_rule(config: Config) -> Iterator[Problem]:
    for key, constraint, value in _values(_checks(Config), config, ""):
        # A range does not say whether null is valid: the type does.
        if value is not None and value not in constraint:
            yield Problem(key, show(value), constraint.words(value))


@dataclasses.dataclass(frozen=True, slots=True)
class _Checks:
    """The constraints in a type. A search of layouts validates hundreds of configurations, and to read the constraints from the types takes
    longer than all other rules."""

    constraint: Constraint | None = None
    """The constraint of the value itself."""
    fields: Mapping[str, _Checks] = dataclasses.field(default_factory=dict)
    """Fields of a dataclass, or keys of a mapping that sets some of them."""
    items: _Checks | None = None
    """The checks of each item of a list or a mapping."""

    @property
    def is_empty(self) -> bool:
        return self.constraint is None and not self.fields and self.items is None


@functools.cache
def _checks(annotation: Any) -> _Checks:
    """Return the constraints in a type, without parts that have no constraint."""
    cls = annotation if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) else partial_class(annotation)
    if cls is not None:
        return _Checks(fields={name: inner for name, child in field_types(cls).items() if not (inner := _checks(child)).is_empty})
    if get_origin(annotation) in (dict, list):
        items = _checks(get_args(annotation)[-1])
        return _Checks(items=None if items.is_empty else items)
    return _Checks(constraint_of(annotation))


def _values(checks: _Checks, value: Any, key: str) -> Iterator[tuple[str, Constraint, Any]]:
    """Yield the key, the constraint and the value of every leaf with a constraint; fields that the conversion left unset are left out."""
    if checks.constraint is not None:
        yield key, checks.constraint, value
    elif checks.items is not None:
        named = isinstance(value, dict)
        for name, child in value.items() if named else enumerate(value):
            yield from _values(checks.items, child, join(key, str(name)) if named else f"{key}[{name}]")
    else:
        for name, inner in checks.fields.items():
            child = value.get(name, _UNSET) if isinstance(value, dict) else getattr(value, name, _UNSET)
            if child is not _UNSET:
                yield from _values(inner, child, join(key, name))


VALUE_RULES: tuple[Rule, ...] = (_constraints_rule,)
