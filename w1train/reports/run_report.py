"""report.html: a file that shows a run, finished or not, on any screen and without a network."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

from w1train.records.average_comparison import comparison_rows, verdict
from w1train.records.summary import mean_over_time, tokens_per_second
from w1train.reports.chart import Cells, Chart, Line
from w1train.reports.plot_data import Values, bucket_means, finite, moving_average, without_outliers
from w1train.reports.report_experts import experts
from w1train.reports.report_metrics import (
    curve_figure,
    end_value,
    event_note,
    events_of,
    not_finite,
    other_metrics,
    smoothing_width,
    waiting,
)
from w1train.reports.report_page import POINTER_NOTE, contents, page, section, wide_table
from w1train.reports.report_phases import phases_table, stage_starts
from w1train.reports.report_samples import becoming, samples
from w1train.reports.run_content import Record, Run, read_run
from w1train.runtime.files import write_text
from w1train.runtime.quantities import duration, quantity

REPORT_NAME = "report.html"
_MAX_HEAT_COLUMNS = 60


def write_report(run_dir: str | Path, other: str | Path | None = None) -> Path:
    """Write ``run_dir/report.html``, and return its path. A torn last line of metrics.jsonl is left out, because training may be writing
    this line.

    Args:
        other: a run whose validation is drawn beside the run's.

    Raises:
        FileNotFoundError: a directory has no metrics.jsonl.
        UserError: the content of a file is not what training writes.
    """
    run = read_run(Path(run_dir))
    run.other = None if other is None else read_run(Path(other))
    parts = (_learning, phases_table, _averages, _noise_levels, experts, _machinery, other_metrics, samples, _appendix)
    texts, sections = becoming(run), [part(run) for part in parts]
    body = [_header(run), contents([texts, *sections]), _headline(run), texts, _tiles(run), *sections]
    path = Path(run_dir) / REPORT_NAME
    shown = [run_dir] if other is None else [run_dir, other]
    write_text(path, page(path, shown, run.name, "\n".join(body)))
    return path


def _header(run: Run) -> str:
    state = f"finished after {run.last_step:,} steps" if run.finished else f"not finished, at step {run.last_step:,}"
    return f'<header><h1>{html.escape(run.name)}</h1><p class="muted">{state}</p></header>'


def _headline(run: Run) -> str:
    """Return the validation loss as a large number, and bars that compare it with the start and with a unigram model."""
    measured = [record for record in run.validation if finite([record.get("elbo_bits_per_byte")])]
    if not measured:
        return '<p class="note">No validation in bits per byte yet.</p>'
    start, now = measured[0]["elbo_bits_per_byte"], measured[-1]["elbo_bits_per_byte"]
    unigram = _unigram(run)
    bars = [("before training" if measured[0]["step"] == 0 else f"at step {measured[0]['step']:,}", start, "")]
    if unigram is not None:
        bars.append(("unigram model", unigram, ""))
    if len(measured) > 1:
        bars.append(("now" if not run.finished else "after training", now, " now"))
    longest = max(value for _, value, _ in bars) or 1.0
    rows = "".join(
        f"<span>{label}</span>"
        f'<span class="track"><span class="bar{css}" style="width:{82 * value / longest:.1f}%"></span>{value:.3f}</span>'
        for label, value, css in bars
    )
    return (
        f'<div class="headline"><div><div class="number accent">{now:.3f}</div><p class="unit">bits per byte on validation text</p>'
        f'<p class="muted">{_against_unigram(now, unigram)}</p></div><div class="bars">{rows}</div></div>{_bound(run)}'
    )


def _bound(run: Run) -> str:
    """Return the sentence about what the number bounds; a run that has not ended has no such sentence."""
    bound = run.summary.get("validation_bound") if run.finished else None
    return f'<p class="note">The number is {html.escape(str(bound))}.</p>' if bound else ""


def _unigram(run: Run) -> float | None:
    values = finite([run.summary.get("unigram_bits_per_byte")])
    return values[0] if values and values[0] > 0 else None


def _against_unigram(now: float, unigram: float | None) -> str:
    if unigram is None:
        return "upper bound (ELBO) at fixed noise levels"
    side = "below" if now < unigram else "above"
    return f"{abs(now / unigram - 1):.1%} {side} what token frequencies alone give"


def _tiles(run: Run) -> str:
    last = run.train[-1] if run.train else {}
    summary = run.summary
    world = summary.get("world_size")
    tokens = last.get("tokens", summary.get("tokens_seen"))
    wall = summary.get("wall_seconds") if run.finished else None
    tiles = [
        ("parameters", _text(summary.get("num_parameters"), quantity)),
        ("tokens seen", _text(tokens, quantity)),
        ("steps", f"{run.last_step:,}"),
        ("epochs", _text(last.get("epoch"), "{:.2f}".format)),
        ("tokens per second", _text(tokens_per_second(run.train), quantity)),
        ("model FLOPs utilisation", _text(mean_over_time(run.train, "time/mfu"), "{:.1%}".format)),
        ("wall time", _text(wall, duration)),
        ("memory of rank 0", _text(last.get("time/memory_gib"), "{:.2f} GiB".format)),
        ("device", f"{world} x {summary.get('device')}" if world else ""),
    ]
    cells = "".join(f"<div><dt>{title}</dt><dd>{html.escape(value)}</dd></div>" for title, value in tiles if value)
    return f'<dl class="tiles">{cells}</dl>'


def _learning(run: Run) -> str:
    """Return the charts of the losses, in bits per byte if the bytes of the text are known, else in nats per token."""
    in_bits = bool(finite(record.get("elbo_bits_per_byte") for record in [*run.train, *run.validation]))
    key, unit = ("elbo_bits_per_byte", "bits per byte") if in_bits else ("elbo", "nats per token")
    unigram = _unigram(run) if in_bits else None
    window = smoothing_width(len(run.train))
    ys = run.column(key)
    validated_at = [record["step"] for record in run.validation]
    validation = [record.get(key) for record in run.validation]
    lines = [
        Line(xs=run.steps, ys=ys, css="accent", raw=True),
        Line(xs=run.steps, ys=moving_average(ys, window), css="accent", name="training", end=end_value(ys, window)),
        Line(xs=validated_at, ys=validation, css="second", dots=True, name="validation", end=end_value(validation)),
    ]
    if run.other is not None:
        others = [record.get(key) for record in run.other.validation]
        steps = [record["step"] for record in run.other.validation]
        lines.append(Line(xs=steps, ys=others, css="middle-run", name=f"validation of {run.other.name}", end=end_value(others), dots=True))
    chart = Chart(
        title=f"ELBO, {unit}",
        sections=stage_starts(run.train),
        lines=[line for line in lines if finite(line.ys)],
        x_range=run.x_range,
        height=360,
        reference=(unigram, f"unigram {unigram:.2f}") if unigram is not None else None,
        marks=not_finite(run, key),
        events=events_of(run),
        format="exact",
    )
    small = [
        curve_figure(run, "loss", "Training loss", "nats"),
        curve_figure(run, "masked_cross_entropy", "Masked cross-entropy", "nats"),
        curve_figure(run, "mask_ratio", "Mask ratio", "of tokens"),
    ]
    note = f"{POINTER_NOTE} Bold lines are means over {window} steps." if window > 1 else POINTER_NOTE
    charts = f'<div class="charts">{chart.figure(css="span")}{"".join(small)}</div>'
    return section("Learning", f'<p class="note">{note}</p>{event_note(run)}{charts}')


def _averages(run: Run) -> str:
    """Return a table for each average of checkpoints, with its members."""
    if not run.averages:
        return ""
    return section("Average of checkpoints", "".join(_average_table(record) for record in run.averages))


def _average_table(record: Record) -> str:
    heading, *rows = comparison_rows(record)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heading)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = wide_table(f'<table class="numbers"><tr>{head}</tr>{body}</table>')
    return f'<p class="note">{html.escape(verdict(record))}</p>{table}'


def _noise_levels(run: Run) -> str:
    """Return charts of the loss by t: a heat map over the training steps, and curves of validations."""
    figures = [figure for figure in (_heat_figure(run), _profile_figure(run)) if figure]
    if not figures:
        return ""
    note = "Cross-entropy of masked tokens, nats, by noise level t: the share of the text that is masked."
    return section("Loss by noise level", f'<p class="note">{note}</p><div class="charts">{"".join(figures)}</div>')


def _heat_figure(run: Run) -> str:
    # A run that was resumed with another number of bins shows the records with the newest number.
    num_bins = next((len(record["loss_by_t"]) for record in reversed(run.train) if record.get("loss_by_t")), 0)
    by_bin = [[_bin(record, index, num_bins) for record in run.train] for index in range(num_bins)]
    rows = [bucket_means(run.steps, values, _MAX_HEAT_COLUMNS)[1] for values in by_bin]
    columns: list[Values] = [list(column) for column in zip(*rows, strict=True)]
    if not finite(value for column in columns for value in column):
        return ""
    low, high = _heat_range(columns)
    centers = [(index + 0.5) / num_bins for index in range(num_bins)]
    end = run.x_range[1]
    edges = [end * index / len(columns) for index in range(len(columns) + 1)]
    cells = Cells(edges, columns, centers, (low, high))
    chart = Chart(title="Training loss by t", lines=[], x_range=run.x_range, height=250, cells=cells)
    return chart.figure(css="span2", caption=f'{low:.1f}<span class="ramp"></span>{high:.1f} nats')


def _heat_range(columns: list[Values]) -> tuple[float, float]:
    """Return the values of the weakest and of the strongest colour."""
    values = without_outliers(finite(value for column in columns for value in column))
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _bin(record: Record, index: int, num_bins: int) -> float | None:
    losses = record.get("loss_by_t") or []
    return losses[index] if len(losses) == num_bins else None


def _profile_figure(run: Run) -> str:
    """Return the curves of the loss by t of the first, a middle and the last validation."""
    records = [record for record in run.validation if finite(record.get("loss_by_t") or [])]
    if not records:
        return ""
    chosen = {0: "early", len(records) // 2: "middle-run", len(records) - 1: "accent"}
    lines = []
    for index, css in sorted(chosen.items()):
        losses, name = records[index]["loss_by_t"], f"step {quantity(records[index]['step'])}"
        lines.append(Line(xs=_timesteps(run, len(losses)), ys=losses, css=css, name=name, dots=css == "accent"))
    return Chart(title="Validation loss by t", lines=lines, x_range=(0.0, 1.0), x_label="t", height=250).figure()


def _timesteps(run: Run, count: int) -> list[float]:
    """Return the timesteps of validation: those of the configuration, or the midpoints of equal bins if it has others."""
    validation = (run.settings or {}).get("validation")
    listed = validation.get("timesteps") if isinstance(validation, dict) else None
    if isinstance(listed, list) and len(listed) == count and all(isinstance(t, float) for t in listed):
        return listed
    return [(index + 0.5) / count for index in range(count)]


def _machinery(run: Run) -> str:
    figures = [
        curve_figure(run, "grad_norm", "Gradient norm", "", log=True),
        curve_figure(run, "learning_rate", "Learning rate", "", smooth=False, from_zero=True, form="scientific"),
        curve_figure(run, "time/tokens_per_second", "Throughput", "tokens/s", from_zero=True, form="quantity"),
        curve_figure(run, "time/mfu", "Model FLOPs utilisation", "", from_zero=True, form="percent"),
        waiting(run),
    ]
    return section("Optimisation and speed", f'<div class="charts">{"".join(figures)}</div>')


def _appendix(run: Run) -> str:
    parts = []
    if run.config:
        parts.append(f"<details><summary>Configuration</summary><pre>{html.escape(run.config)}</pre></details>")
    if found := run.summary.get("versions"):
        rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in found.items() if value)
        parts.append(f"<details><summary>Versions</summary><table>{rows}</table></details>")
    return section("How it was made", "".join(parts)) if parts else ""


def _text(value: float | None, format_value: Callable[[float], str]) -> str:
    return "" if value is None else format_value(value)
