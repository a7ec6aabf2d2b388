"""The stages of a run with several objectives, for its report."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

from w1train.reports.plot_data import finite
from w1train.reports.report_page import section, wide_table

Record = dict[str, Any]

_NUM_STEPS = 5
"""The number of steps at each end of a stage that losses are averaged over."""


class HasRecords(Protocol):
    """The part of w1train.reports.run_content.Run that this module reads."""

    train: list[Record]
    validation: list[Record]


def stage_starts(train: Sequence[Record]) -> list[tuple[float, str]]:
    """Return first step and name of each stage; an empty list for a run of one objective."""
    stages = _stages(train)
    return (
        [] if len({records[0].get("block_size") for _, records in stages}) < 2 else [(records[0]["step"], name) for name, records in stages]
    )


def phases_table(run: HasRecords) -> str:
    """Return a table with a row for each stage: its first step, its block size, and its losses. "" for a run of one objective."""
    if not stage_starts(run.train):
        return ""
    rows = [_row(name, records, run.validation) for name, records in _stages(run.train)]
    heading = ("stage", "from step", "block size", "ELBO at first", "ELBO at last", "validation at its end")
    head = "".join(f"<th>{cell}</th>" for cell in heading)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    note = (
        f"The ELBO is in nats per token; that of training is a mean over {_NUM_STEPS} steps. ELBOs of different block sizes are those of "
        "different models of the text."
    )
    table = wide_table(f'<table class="numbers"><tr>{head}</tr>{body}</table>')
    return section("Stages", f'<p class="note">{note}</p>{table}')


def _stages(train: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    return [(str(name), list(records)) for name, records in groupby(train, key=lambda record: record.get("stage", ""))]


def _row(name: str, records: list[Record], validation: Sequence[Record]) -> list[str]:
    last_step = records[-1]["step"]
    at_end = [record["elbo"] for record in validation if record["step"] == last_step]
    ends = (records[:_NUM_STEPS], records[-_NUM_STEPS:])
    means = [_mean(finite(record.get("elbo") for record in part)) for part in ends]
    return [name, f"{records[0]['step']:,}", str(records[0].get("block_size")), *means, _mean(finite(at_end))]


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4f}" if values else ""
