"""Checks of a run directory's files, before pages are made of them: somebody else may have written them.

Pages compute with these values. A text in the place of a number, or 1e300, would be an error in the middle of a chart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from w1train.config.errors import UserError
from w1train.config.reading import is_number, shorten
from w1train.records.average_comparison import COLUMNS

Record = dict[str, Any]

_FARTHEST, _NEAREST = 1e100, 1e-100
"""The largest and the smallest number on the axes of a chart. Larger numbers count as infinite, smaller numbers as zero."""
_MOST_BINS = 10_000
_DRAWN = frozenset(
    ("loss", "elbo", "elbo_bits_per_byte", "masked_cross_entropy", "mask_ratio", "grad_norm", "learning_rate", "epoch", "samples")
)
_COUNTS = (
    *("num_parameters", "num_active_parameters", "world_size", "steps", "tokens_seen"),
    *("tokens_per_second", "wall_seconds", "unigram_bits_per_byte"),
)


def check_metrics(path: Path, records: Sequence[Record]) -> None:
    """Check records of metrics.jsonl, and replace numbers that are outside the range of charts.

    Raises:
        UserError: a value is of another type than the pages need. The message names the file, the step and the value.
    """
    for record in records:
        _require(path, record, {"tokens": _is_count} if record.get("kind") in ("train", "validation") else {})
        if record.get("kind") == "validation":
            record.setdefault("elbo", None)
        optional = {
            "loss_by_t": _is_list_of_numbers,
            "experts/loads": _is_table_of_numbers,
            "block_size": is_number,
            "health/skipped_steps": _is_count,
        }
        drawn = {name: is_number for name in record if name in _DRAWN or name.startswith(("time/", "experts/"))}
        present = {name: check for name, check in {**drawn, **optional}.items() if record.get(name) is not None}
        _require(path, record, present)
        if record.get("kind") == "average":
            _check_average(path, record)
        record.update({name: _drawable(value) for name, value in record.items() if name != "step"})


def check_samples(path: Path, records: Sequence[Record]) -> None:
    """Check records of samples.jsonl as :func:`check_metrics` does."""
    for record in records:
        _require(path, record, {"tokens": _is_count, "prompt": _is_text, "text": _is_text})


def check_events(path: Path, records: Sequence[Record]) -> None:
    """Check records of events.jsonl as :func:`check_metrics` does."""
    for record in records:
        _require(path, record, {"event": _is_text})


def check_summary(path: Path, summary: Record) -> None:
    """Check summary.json as :func:`check_metrics` does, and remove values that are null."""
    for name in [name for name, value in summary.items() if value is None]:
        del summary[name]
    for name in _COUNTS:
        value = summary.get(name)
        if value is not None and not _is_count(value):
            raise UserError(f"{path} is not a summary: its {name} is {shorten(value)}")
    versions = summary.get("versions")
    if versions is not None and not (isinstance(versions, dict) and all(value is None or _is_text(value) for value in versions.values())):
        raise UserError(f"{path} is not a summary: its versions are {shorten(versions)}")


def _check_average(path: Path, record: Record) -> None:
    num_members = len(record["members"]) if isinstance(record.get("members"), list) else 0
    columns = {f"member_{name}": lambda value: _is_list_of_numbers(value) and len(value) == num_members for name in COLUMNS}
    needed = {
        "metric": lambda value: isinstance(value, str) and value in COLUMNS,
        "members": lambda value: num_members > 0 and all(map(_is_count, value)),
        "best_member": _is_count,
        "is_better": lambda value: isinstance(value, bool),
        **{name: check for name, check in columns.items() if name in record},
    }
    _require(path, record, needed)
    metric = record["metric"]
    _require(path, record, {metric: _is_count, f"member_{metric}": lambda value: _is_list_of_numbers(value) and all(map(_is_count, value))})
    for name in COLUMNS:
        if record.get(name) is not None:
            _require(path, record, {f"member_{name}": columns[f"member_{name}"]})


def _require(path: Path, record: Record, checks: Mapping[str, Callable[[Any], bool]]) -> None:
    for name, is_valid in checks.items():
        if name not in record:
            raise UserError(f"{path}: the record of step {record['step']} has no {name}")
        if not is_valid(record[name]):
            raise UserError(f"{path}: the record of step {record['step']} has {shorten(record[name])} as its {name}")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return is_number(value) and 0 <= value < _FARTHEST


def _is_list_of_numbers(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_BINS and all(item is None or is_number(item) for item in value)


def _is_table_of_numbers(value: object) -> bool:
    """Return whether a value is a list of rows of numbers, and the rows have the same length."""
    if not isinstance(value, list) or not all(map(_is_list_of_numbers, value)):
        return False
    return 0 < len(value) <= _MOST_BINS and {len(row) for row in value} == {len(value[0])} != {0}


def _drawable(value: Any) -> Any:
    if isinstance(value, list):
        return [_drawable(item) for item in value]
    if not is_number(value) or math.isnan(value):
        return value
    if abs(value) > _FARTHEST:
        return math.copysign(math.inf, value)
    return 0.0 if 0 < abs(value) < _NEAREST else value
