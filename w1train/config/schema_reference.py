"""The command that writes docs/configuration.md from the schema, or prints it: ``python -m w1train.config.schema_reference [FILE]``."""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import ast
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from w1train.config import schema
from w1train.config.argument_parser import ArgumentParser
from w1train.config.constraints import LARGEST_FLOAT, LARGEST_INTEGER, PathText
from w1train.config.errors import show
from w1train.config.field_types import constraint_of, describe_type, field_types, is_required, join

_INTRODUCTION = f"""\
# Configuration reference

`python -m w1train.config.schema_reference docs/configuration.md` writes this page from `w1train/config/schema.py`,
`schema_model.py` and `schema_operation.py`; a test checks that it is up to date.

`recipe=NAME` chooses a run, `GROUP=OPTION` one of its parts, and `KEY=VALUE` a single value; KEY is a key of the tables below.
`~KEY` goes back to the default. `w1train train recipe=NAME --cfg job` prints every value of a run.
[recipes/README.md](../recipes/README.md) explains the marks in recipes.
Where a table gives no upper bound, integers are at most {LARGEST_INTEGER} and other numbers at most {LARGEST_FLOAT}."""


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, on one line."""
    (class_node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(class_node, ast.ClassDef)
    docstrings = {}
    for statement, following in zip(class_node.body, class_node.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) and isinstance(following.value.value, str):
            docstrings[statement.target.id] = " ".join(following.value.value.split())
    return docstrings


def reference() -> str:
    """Return the whole reference, in Markdown."""
    top_level = [name for name, annotation in field_types(schema.Config).items() if not dataclasses.is_dataclass(annotation)]
    sections = [_section(schema.Config, "", "The run", only=top_level)]
    for name, annotation in field_types(schema.Config).items():
        if dataclasses.is_dataclass(annotation):
            sections.extend(_sections(annotation, name))
        sections.extend(_mapping_sections(annotation, name))
    return "\n\n".join([_INTRODUCTION, *sections]) + "\n"


def _sections(cls: Any, key: str) -> Iterator[str]:
    """Yield the section of a class, and then those of the classes inside it."""
    parts = {name: annotation for name, annotation in field_types(cls).items() if dataclasses.is_dataclass(annotation)}
    yield _section(cls, key, key, only=[name for name in field_types(cls) if name not in parts])
    for name, annotation in parts.items():
        yield from _sections(annotation, join(key, name))


def _mapping_sections(annotation: Any, key: str) -> list[str]:
    """Return the sections of mappings from names, such as the stages of the schedule."""
    if not dataclasses.is_dataclass(annotation):
        return []
    mappings = {name: get_args(inner)[1] for name, inner in field_types(annotation).items() if get_origin(inner) is dict}  # type: ignore[arg-type]
    return [_section(cls, f"{key}.{name}.NAME", f"{key}.{name}.NAME") for name, cls in mappings.items() if dataclasses.is_dataclass(cls)]


def _section(cls: Any, key: str, title: str, only: Sequence[str] | None = None) -> str:
    docstrings, types = field_docstrings(cls), field_types(cls)
    rows = ["| key | valid | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if only is None or field.name in only:
            full_key = join(key, field.name)
            cells = (f"`{full_key}`", _valid(types[field.name]), _default(field), docstrings[field.name])
            rows.append(f"| {' | '.join(cell.replace('|', '\\|') for cell in cells)} |")
    return "\n".join([f"## {title}", "", " ".join((cls.__doc__ or "").split()), "", *rows])


def _valid(annotation: Any) -> str:
    """Say in words what is valid: the type, and the constraint that it or the type of its items carries."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict and dataclasses.is_dataclass(arguments[1]):
        return "a mapping from names (see below)"
    item = arguments[0] if origin is list else arguments[1] if origin is dict else annotation
    constraint = constraint_of(item)
    if isinstance(constraint, PathText):
        return constraint.valid if item is annotation else describe_type(annotation).replace("a string", constraint.valid)
    return describe_type(annotation) + (f", {constraint}" if constraint else "")


def _default(field: dataclasses.Field[Any]) -> str:
    if is_required(field):
        return "**required**"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return f"`{show(value)}`"


def main(arguments: Sequence[str]) -> None:
    """Write the reference to the file that the argument names, or print it if there is no argument."""
    # argparse, because a bare sys.argv took --help as the name of the file.
    parser = ArgumentParser(prog="python -m w1train.config.schema_reference", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="where to write the reference; printed if absent")
    path: Path | None = parser.parse_args(arguments).file
    if path is None:
        print(reference(), end="")
    else:
        path.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
