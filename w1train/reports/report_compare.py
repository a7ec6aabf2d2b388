"""comparison.html: several runs in the same charts, over the tokens that they have seen."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from w1train.config.errors import UserError
from w1train.records.summary import mean_over_time, tokens_per_second
from w1train.reports.chart import Chart, Format, Line
from w1train.reports.plot_data import Values, finite, moving_average
from w1train.reports.report_metrics import smoothing_width
from w1train.reports.report_page import POINTER_NOTE, contents, page, section, wide_table
from w1train.reports.run_content import Run, read_run
from w1train.runtime.files import write_text
from w1train.runtime.quantities import duration, quantity

MAX_RUNS = 8
"""The number of colours that can be told apart."""
_ABSENT = "\u2013"
_INTERPOLATION_NOTE = (
    "The runs have no validation after the same number of tokens. A value behind \u2248 lies on the line between the validations before "
    "and after, and so the row has no best value. Validate after the same numbers of tokens to compare measured values."
)


@dataclass(slots=True, frozen=True)
class Interpolated:
    """A value between two measurements."""

    value: float


@dataclass(slots=True, frozen=True)
class Row:
    """A row of the table of results."""

    title: str
    values: Sequence[float | str | Interpolated | None]
    format: Callable[[float], str] = "{:,.0f}".format
    lower_is_better: bool = False
    """True: the lowest of several values is bold, if all of them are measured."""


def write_comparison(run_dirs: Sequence[str | Path], output: str | Path) -> Path:
    """Write a page that compares runs, and return its path.

    Raises:
        FileNotFoundError: a directory has no metrics.jsonl.
        UserError: there are more runs than colours, or the content of a file is not what training writes.
    """
    if len(run_dirs) > MAX_RUNS:
        raise UserError(f"{len(run_dirs)} runs to compare; {MAX_RUNS} at most can be told apart")
    runs = [read_run(Path(run_dir)) for run_dir in run_dirs]
    _name_apart(runs, [Path(run_dir) for run_dir in run_dirs])
    sections = [part(runs) for part in (_results, _learning, _machinery, _differences)]
    path = Path(output)
    title = " and ".join(run.name for run in runs)
    write_text(path, page(path, run_dirs, title, "\n".join([_header(runs), contents(sections), *sections])))
    return path


def _name_apart(runs: Sequence[Run], run_dirs: Sequence[Path]) -> None:
    """Call runs of the same name by their paths."""
    names = [run.name for run in runs]
    for run, run_dir in zip(runs, run_dirs, strict=True):
        if names.count(run.name) > 1:
            run.name = str(run_dir)


def _header(runs: Sequence[Run]) -> str:
    legend = "".join(
        f'<span><span class="dot series-{index}"></span>{html.escape(run.name)} <span class="muted">{_state(run)}</span></span>'
        for index, run in enumerate(runs)
    )
    return f'<header><h1>{len(runs)} runs compared</h1><div class="legend">{legend}</div></header>'


def _state(run: Run) -> str:
    return f"finished, {run.last_step:,} steps" if run.finished else f"at step {run.last_step:,}"


def _results(runs: Sequence[Run]) -> str:
    rows = [row for row in _rows(runs) if any(value is not None for value in row.values)]
    is_estimated = any(isinstance(value, Interpolated) for row in rows for value in row.values)
    note = f'<p class="note">{_INTERPOLATION_NOTE}</p>' if is_estimated else ""
    return section("Results", note + _table(runs, [(row.title, _cells(row)) for row in rows]))


def _rows(runs: Sequence[Run]) -> list[Row]:
    def each(value: Callable[[Run], Any]) -> list[Any]:
        return [value(run) for run in runs]

    exact, share = "{:.4f}".format, "{:.1%}".format
    common = _common_tokens(runs)
    at_common = [] if common is None else each(lambda run: _at_tokens(run, "elbo", common))
    return [
        Row(f"validation ELBO at {quantity(common or 0)} tokens", at_common, exact, lower_is_better=True),
        Row("last validation, bits per byte", each(lambda run: _last(run.validation, "elbo_bits_per_byte")), exact, lower_is_better=True),
        Row("last validation ELBO, nats per token", each(lambda run: _last(run.validation, "elbo")), exact, lower_is_better=True),
        Row("best validation ELBO", each(lambda run: min(_validations(run, "elbo").values(), default=None)), exact, lower_is_better=True),
        Row("training ELBO at the end", each(lambda run: _mean_at_end(run, "elbo")), exact),
        Row("tokens seen", each(lambda run: _last(run.train, "tokens")), quantity),
        Row("steps", each(lambda run: float(run.last_step))),
        Row("parameters", each(lambda run: run.summary.get("num_parameters"))),
        Row("parameters that compute a token", each(lambda run: run.summary.get("num_active_parameters"))),
        Row("largest load of an expert at the end, times the mean", each(lambda run: _mean_at_end(run, "experts/load")), "{:.2f}".format),
        Row("experts without a token at the end", each(lambda run: _mean_at_end(run, "experts/unused")), share),
        Row("tokens per second", each(lambda run: tokens_per_second(run.train)), quantity),
        Row("model FLOPs utilisation", each(lambda run: mean_over_time(run.train, "time/mfu")), share),
        Row("waiting for data", each(lambda run: _share(run, "time/data_wait_seconds")), share),
        Row("waiting for communication", each(lambda run: _share(run, "time/communication_seconds")), share),
        Row("memory of rank 0, GiB", each(lambda run: _last(run.train, "time/memory_gib")), "{:.2f}".format),
        Row("wall time", each(lambda run: run.summary.get("wall_seconds") if run.finished else None), duration),
        Row("restarts", each(lambda run: float(len(run.restarts)) if run.events else None)),
        Row("steps skipped", each(lambda run: _last(run.train, "health/skipped_steps"))),
        Row("device", each(_device)),
        Row("code", each(_code)),
    ]


def _common_tokens(runs: Sequence[Run]) -> float | None:
    """Return the largest number of tokens after which all runs were validated. Without such a number, return the tokens that the
    validations of all runs reach: some values there are interpolated. None if that is the start, or if the last validations of all runs are
    after as many tokens, because the table has those."""
    measured = [_validations(run, "elbo") for run in runs]
    ends = [max(values, default=0) for values in measured]
    common = max(set.intersection(*map(set, measured)), default=0) or min(ends)
    return common if common > 0 and {*ends} != {common} else None


def _validations(run: Run, key: str) -> dict[float, float]:
    """Return the measured values of validation by the tokens that the run had seen."""
    return {record["tokens"]: record[key] for record in run.validation if finite([record.get(key)])}


def _at_tokens(run: Run, key: str, tokens: float) -> float | Interpolated | None:
    """Return the value of the validation after a number of tokens. Without this validation, interpolate between the validations before and
    after it."""
    known = _validations(run, key)
    if tokens in known:
        return known[tokens]
    for (start, before), (end, after) in pairwise(known.items()):
        if start < tokens < end:
            return Interpolated(before + (after - before) * (tokens - start) / (end - start))
    return None


def _last(records: Sequence[dict[str, Any]], key: str) -> float | None:
    known = finite(record.get(key) for record in records)
    return known[-1] if known else None


def _mean_at_end(run: Run, key: str) -> float | None:
    known = finite(run.column(key)[-smoothing_width(len(run.train)) :])
    return math.fsum(known) / len(known) if known else None


def _share(run: Run, key: str) -> float | None:
    """Return the share of a time in the time of all steps."""
    spent, whole = finite(run.column(key)), finite(run.column("time/step_seconds"))
    return sum(spent) / sum(whole) if spent and sum(whole) > 0 else None


def _device(run: Run) -> str | None:
    world = run.summary.get("world_size")
    return f"{world} x {run.summary.get('device')}" if world else None


def _code(run: Run) -> str | None:
    commit = (run.summary.get("versions") or {}).get("git_commit")
    return None if commit is None else commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def _cells(row: Row) -> list[tuple[str, str]]:
    """Return (text, class) of each run's value. The best of several measured values has a class of its own."""
    best = _best(row)
    cells = []
    for value in row.values:
        if value is None or isinstance(value, str):
            cells.append((value or _ABSENT, ""))
        elif isinstance(value, Interpolated):
            cells.append((f"\u2248 {row.format(value.value)} (interpolated)", "muted"))
        else:
            cells.append((row.format(value), "best" if row.format(value) == best else ""))
    return cells


def _best(row: Row) -> str | None:
    """Return the text of the best value, or None if the row has no best value. Runs with the same text are equally good."""
    measured = finite(value for value in row.values if isinstance(value, float | int))
    is_estimated = any(isinstance(value, Interpolated) for value in row.values)
    return row.format(min(measured)) if row.lower_is_better and len(measured) > 1 and not is_estimated else None


def _table(runs: Sequence[Run], rows: Sequence[tuple[str, list[tuple[str, str]]]]) -> str:
    """Return a table with a column for each run, whose first column stays in view."""
    head = "".join(f'<th><span class="dot series-{index}"></span>{html.escape(run.name)}</th>' for index, run in enumerate(runs))
    body = "".join(
        f"<tr><td>{html.escape(title)}</td>"
        + "".join(f'<td class="{css}">{html.escape(text)}</td>' if css else f"<td>{html.escape(text)}</td>" for text, css in cells)
        + "</tr>"
        for title, cells in rows
    )
    return wide_table(f'<table class="compared"><tr><td></td>{head}</tr>{body}</table>')


def _learning(runs: Sequence[Run]) -> str:
    """Return the charts of the losses, in bits per byte if all runs have values in bits per byte, and otherwise in nats per token."""
    in_bits = all(finite(record.get("elbo_bits_per_byte") for record in [*run.train, *run.validation]) for run in runs)
    key, unit = ("elbo_bits_per_byte", "bits per byte") if in_bits else ("elbo", "nats per token")
    figures = [
        _curves(runs, key, f"Validation ELBO, {unit}", of_validation=True),
        _curves(runs, key, f"Training ELBO, {unit}"),
        _curves(runs, "loss", "Training loss, nats"),
        _curves(runs, "masked_cross_entropy", "Masked cross-entropy, nats"),
    ]
    note = "The horizontal axis is the number of tokens seen. Dots are measured values, and curves of training are running means."
    return section("Learning", f'<p class="note">{note} {POINTER_NOTE}</p><div class="charts">{"".join(figures)}</div>')


def _machinery(runs: Sequence[Run]) -> str:
    figures = [
        _curves(runs, "grad_norm", "Gradient norm", log=True),
        _curves(runs, "learning_rate", "Learning rate", smooth=False, from_zero=True, form="scientific"),
        _curves(runs, "block_size", "Block size", smooth=False, log=True, form="count")
        if len({size for run in runs for size in run.column("block_size")}) > 1
        else "",
        _curves(runs, "experts/load", "Largest load of an expert, times the mean"),
        _curves(runs, "time/tokens_per_second", "Tokens per second", from_zero=True, form="quantity"),
        _curves(runs, "time/mfu", "Model FLOPs utilisation", from_zero=True, form="percent"),
        _curves(runs, "time/communication_seconds", "Communication, seconds a step", from_zero=True),
    ]
    return section("Optimisation and speed", f'<div class="charts">{"".join(figures)}</div>')


def _curves(
    runs: Sequence[Run],
    key: str,
    title: str,
    *,
    of_validation: bool = False,
    smooth: bool = True,
    log: bool = False,
    from_zero: bool = False,
    form: Format = "general",
) -> str:
    """Return the figure of one quantity of all runs, or "" if no run has measured it. The figure of a validation is wide."""
    lines = []
    for index, run in enumerate(runs):
        records = run.validation if of_validation else run.train
        ys: Values = [record.get(key) for record in records]
        if not finite(ys):
            continue
        if smooth and not of_validation:
            ys = moving_average(ys, smoothing_width(len(ys)))
        lines.append(Line(xs=[record["tokens"] for record in records], ys=ys, css=f"series-{index}", dots=of_validation, name=run.name))
    if not lines:
        return ""
    farthest = max(max(line.xs) for line in lines)
    chart = Chart(
        title=title,
        lines=lines,
        x_range=(0.0, float(farthest or 1)),
        x_label="tokens",
        height=360 if of_validation else 190,
        log=log,
        from_zero=from_zero,
        format=form,
    )
    return chart.figure(css="span" if of_validation else "")


def _differences(runs: Sequence[Run]) -> str:
    """Return the table of the keys whose values differ between the runs' configurations."""
    configs = [None if run.settings is None else _flat(run.settings) for run in runs]
    known = [config for config in configs if config is not None]
    keys = dict.fromkeys(key for config in known for key in config if key != "name")
    differing = [key for key in keys if len({str(config.get(key, _ABSENT)) for config in known}) > 1]
    if not differing:
        said = "All runs have the same configuration." if len(known) == len(runs) else "Some runs have no config.yaml."
        return section("Configuration", f'<p class="note">{said}</p>')
    differ = "One key differs." if len(differing) == 1 else f"{len(differing)} keys differ."
    rows = [(key, [(_shown(config, key), "") for config in configs]) for key in differing]
    return section("Configuration", f'<p class="note">{differ}</p>{_table(runs, rows)}')


def _shown(config: dict[str, Any] | None, key: str) -> str:
    value = _ABSENT if config is None else config.get(key, _ABSENT)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _flat(tree: Mapping[Any, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{key}."))
        else:
            flat[key] = value
    return flat
