"""The comparison of an average of checkpoints with its members: its record in metrics.jsonl, and a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from w1train.config.schema_operation import cost

COLUMNS = {
    **{"elbo": "ELBO", "elbo_bits_per_byte": "bits/byte", "masked_cross_entropy": "masked CE"},
    "preference_accuracy": "preference accuracy",
}
"""The metrics that are compared, and their headings."""


def compare(checkpoint: str, metric: str, validation: Mapping[str, Any], members: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Return the values of a record of kind "average".

    Args:
        checkpoint: name of the average.
        metric: the metric that decides which checkpoint is better.
        validation: scores of the average, as w1train.training.validation.validate returns them.
        members: scores of the members by step; at least the metrics in ``COLUMNS``.
    """
    steps = sorted(members)
    best = min(steps, key=lambda step: (cost(metric, members[step][metric]), -step))
    return {
        "checkpoint": checkpoint,
        "metric": metric,
        "members": steps,
        **{f"member_{name}": [members[step].get(name) for step in steps] for name in COLUMNS if name in validation},
        "best_member": best,
        "is_better": cost(metric, validation[metric]) < cost(metric, members[best][metric]),
        **validation,
    }


def comparison_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """Return the table as text: the headings, a row for each member, and the row of the average."""
    names = [name for name in COLUMNS if record.get(name) is not None]
    heading = ["", *(COLUMNS[name] for name in names)]
    columns = [record[f"member_{name}"] for name in names]
    rows = [[f"step {step:,}", *(_text(column[index]) for column in columns)] for index, step in enumerate(record["members"])]
    return [heading, *rows, ["average", *(_text(record[name]) for name in names)]]


def verdict(record: Mapping[str, Any]) -> str:
    """Return a sentence that says whether the average is better than every member, or how many members it is better than."""
    metric, members = record["metric"], record[f"member_{record['metric']}"]
    value, best = record[metric], min(members, key=partial(cost, metric))
    num_beaten = sum(cost(metric, value) < cost(metric, member) for member in members)
    than = f"{COLUMNS[metric]} {value:.4f} against {best:.4f} of step {record['best_member']:,} ({_change(value, best)})"
    if record["is_better"]:
        return f"The average is better than each of its {len(members)} members: {than}."
    return f"The average is better than {num_beaten} of its {len(members)} members, but not better than the best of them: {than}."


def comparison_lines(record: Mapping[str, Any]) -> list[str]:
    """Return the lines that a console shows: the table and the verdict."""
    rows = comparison_rows(record)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]
    return [f"average of {len(record['members'])} checkpoints: {record['checkpoint']}", *table, verdict(record)]


def average_summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what summary.json has of the newest average; None for a run without averages."""
    if not records:
        return None
    names = ("step", "checkpoint", "metric", "members", "best_member", "is_better", *COLUMNS, *(f"member_{name}" for name in COLUMNS))
    return {name: records[-1][name] for name in names if name in records[-1]}


def _change(value: float, best: float) -> str:
    return f"{value / best - 1:+.2%}" if best else f"{value - best:+.4f}"


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
