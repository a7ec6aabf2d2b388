"""The types of the schema's fields as code reads them: what a field takes, whether it may be null, and its constraint."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from w1train.config.constraints import Constraint, PathText, Range
from w1train.config.errors import listing

_SCALARS: dict[object, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the name and the resolved type of every field of a dataclass, in order."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Tell whether the field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def is_optional(annotation: Any) -> bool:
    """Tell whether the type includes null."""
    return get_origin(annotation) in (types.UnionType, Union) and type(None) in get_args(annotation)


def without_null(annotation: Any) -> Any:
    """Return the type without null."""
    if not is_optional(annotation):
        return annotation
    (inner,) = (argument for argument in get_args(annotation) if argument is not type(None))
    return inner


@functools.cache
def constraint_of(annotation: Any) -> Constraint | None:
    """Return the constraint that a type carries, with or without null; None if it has no constraint."""
    metadata = _metadata(without_null(annotation))
    return metadata if isinstance(metadata, Range | PathText) else None


def field_ranges(cls: type) -> dict[str, Range]:
    """Return the ranges of the fields of a dataclass that are numbers."""
    constraints = {name: constraint_of(annotation) for name, annotation in field_types(cls).items()}
    return {name: constraint for name, constraint in constraints.items() if isinstance(constraint, Range)}


def scalar_type(annotation: Any) -> Any:
    """Return a scalar's type without null and without its constraint: int, float, bool, str or a Literal."""
    inner = without_null(annotation)
    return get_args(inner)[0] if get_origin(inner) is Annotated else inner


@functools.cache
def partial_class(annotation: Any) -> Any:
    """Return the dataclass some of whose fields a mapping sets, ``Annotated[dict[str, Any], cls]``; None for every other type."""
    metadata = _metadata(annotation)
    return metadata if isinstance(metadata, type) else None


def _metadata(annotation: Any) -> Any:
    return get_args(annotation)[1] if get_origin(annotation) is Annotated else None


def describe_type(annotation: Any) -> str:
    """Say in words what values a field of this type takes; its constraint is not mentioned."""
    if is_optional(annotation):
        return f"{describe_type(without_null(annotation))} or null"
    if cls := partial_class(annotation):
        return f"a mapping with some of the keys {listing(field_types(cls))}"
    scalar, origin, arguments = scalar_type(annotation), get_origin(annotation), get_args(annotation)
    if scalar in _SCALARS:
        return _SCALARS[scalar]
    if origin is Literal:
        return f"one of: {listing(arguments)}"
    if origin is list:
        return f"a list, each item {describe_type(arguments[0])}"
    if origin is dict:
        return f"a mapping from names, each value {describe_type(arguments[1])}"
    return f"a mapping with the keys {listing(field_types(annotation))}"


def join(prefix: str, name: str) -> str:
    """Return the full key of ``name`` under ``prefix``."""
    return f"{prefix}.{name}" if prefix else name
