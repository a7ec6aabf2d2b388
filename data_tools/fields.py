"""The fields of records: how a name such as a.b is looked up in a record, and checked against the schema of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from w1train.config.reading import shorten
from w1train.data.text.file_names import CorpusError

if TYPE_CHECKING:
    import pyarrow

_MOST_NAMES = 10
_LONGEST_TYPE = 200


def look_up(record: object, name: str) -> Any:
    """Return the value of the field with this name, or else of the nested field; None also if an object around the field is null.

    Raises:
        CorpusError: if the record has no such field; the message says what it has.
    """
    if isinstance(record, dict) and name in record:
        return record[name]
    path: list[str] = []
    for part in name.split("."):
        if record is None and path:
            return None
        place = f"its {'.'.join(path)!r}" if path else "it"
        if not isinstance(record, dict):
            raise CorpusError(f"{place} is {_described(record, part)}")
        if part not in record:
            raise CorpusError(f"{place} has the fields {_listed(list(map(str, record)))}")
        record = record[part]
        path.append(part)
    return record


def _described(value: object, part: str) -> str:
    if isinstance(value, list) and any(isinstance(element, dict) and part in element for element in value):
        return f"a list of objects, each with a {part!r}. A document is one text: join the texts of each list into one field"
    return f"no object but a {type(value).__name__}"


def schema_fault(schema: pyarrow.Schema, fields: Sequence[str]) -> str:
    """Describe what is wrong with a table of this schema: a field that it does not have, or a text field, the first of the fields, that is
    not text. The description is empty if nothing is wrong."""
    for number, field in enumerate(fields):
        if fault := _field_fault(schema, field, is_text=number == 0):
            return f"{fault}; its columns: {_listed(schema.names)}" if fault.startswith("has no column") else fault
    return ""


def _field_fault(schema: pyarrow.Schema, field: str, *, is_text: bool) -> str:
    from pyarrow import types

    name, *parts = [field] if field in schema.names else field.split(".")
    if name not in schema.names:
        return f"has no column {field!r}"
    if schema.names.count(name) > 1:
        return f"has several columns {name!r}"
    kind = _plain(schema.field(name).type)
    for part in parts:
        if not types.is_struct(kind):
            return f"has no field {field!r}: {_type_fault(name, kind, part)}"
        children = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        if part not in children:
            return f"has no field {field!r}: {name!r} is {_short(kind)}, with the fields {_listed(list(children))}"
        name, kind = f"{name}.{part}", _plain(children[part])
    if is_text and not _may_be_text(kind):
        names = [column.name for column in schema if _may_be_text(_plain(column.type))]
        return f"has no text in {field!r}: {_type_fault(name, kind)}; its columns of text: {_listed(names)}"
    return ""


def _type_fault(name: str, kind: pyarrow.DataType, part: str = "") -> str:
    """Say what a column is that is not a struct or not text, and what could be meant."""
    from pyarrow import types

    fault = f"{name!r} is {_short(kind)}"
    if not types.is_nested(kind) or types.is_struct(kind):
        return fault
    element = _plain(kind.value_type) if hasattr(kind, "value_type") else kind
    if types.is_struct(element):
        fault += f", a list of structs with the fields {_listed([element.field(i).name for i in range(element.num_fields)])}"
    meant = f" Each element may have a {part!r}, but a" if part else " A"
    return f"{fault}.{meant} document is one text: join the texts of each row into a column of its own, and name that column"


def _plain(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Return the type of the values, without a dictionary, runs or an extension around it."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    return _plain(kind.storage_type) if isinstance(kind, pyarrow.BaseExtensionType) else kind


def _may_be_text(kind: pyarrow.DataType) -> bool:
    """Tell whether values are strings, bytes or of several types."""
    from pyarrow import types

    return any(
        is_kind(kind)
        for is_kind in (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
            types.is_fixed_size_binary,
            types.is_union,
        )
    )


def _listed(names: Sequence[str]) -> str:
    shown = [shorten(name)[1:-1] for name in names[:_MOST_NAMES]]
    return ", ".join([*shown, f"and {len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else shown) or "none"


def _short(kind: pyarrow.DataType) -> str:
    text = str(kind)
    return text if len(text) <= _LONGEST_TYPE else f"{text[:_LONGEST_TYPE]}..."
