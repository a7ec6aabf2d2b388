"""The figures of a report: a chart for each metric, and the events that are marked in the charts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from w1train.config.reading import is_number
from w1train.reports.chart import Chart, Event, Format, Line
from w1train.reports.plot_data import Values, finite, moving_average
from w1train.reports.report_page import section
from w1train.reports.run_content import Run

_MAX_EVENTS = 150

# The report shows these elsewhere, or they are counts whose curves tell nothing.
_SHOWN = {
    *("kind", "step", "samples", "tokens", "stage", "block_size", "batch_size", "epoch", "loss_by_t"),
    *("loss", "elbo", "elbo_bits_per_byte", "masked_cross_entropy", "mask_ratio", "grad_norm", "learning_rate"),
    *("time/step_seconds", "time/tokens_per_second", "time/tflops_per_second", "time/mfu", "time/data_wait_seconds"),
    *("time/communication_seconds", "time/memory_gib"),
}


def curve_figure(
    run: Run,
    key: str,
    title: str,
    unit: str,
    *,
    log: bool = False,
    from_zero: bool = False,
    smooth: bool = True,
    form: Format = "general",
) -> str:
    """Return the figure of one quantity over the steps, or "" if the run has not measured it."""
    ys = run.column(key)
    if not finite(ys):
        return ""
    window = smoothing_width(len(ys)) if smooth else 1
    lines = [Line(xs=run.steps, ys=ys, css="accent", raw=True)] if window > 1 else []
    averaged = moving_average(ys, window)
    lines.append(Line(xs=run.steps, ys=averaged, css="accent"))
    marks = not_finite(run, key)
    chart = Chart(title=title, lines=lines, x_range=run.x_range, log=log, from_zero=from_zero, marks=marks, format=form)
    value = f"{chart.text(finite(averaged)[-1])} {unit}".strip()
    notes = [f"{len(marks)} NaN or infinite"] if marks else []
    if num_clipped := chart.num_clipped():
        notes.append(f"{num_clipped} off axis")
    return chart.figure(", ".join([value, *notes]))


def waiting(run: Run) -> str:
    """Return the figure of the shares of step time that the run waited, or "" if the run has not measured its communication."""
    curves = {"data": "time/data_wait_seconds", "communication": "time/communication_seconds"}
    if not finite(run.column(curves["communication"])):
        return ""
    width = smoothing_width(len(run.train))
    lines = []
    for (name, key), css in zip(curves.items(), ("second", "accent"), strict=True):
        shares = [_share(record.get(key), record.get("time/step_seconds")) for record in run.train]
        averaged = moving_average(shares, width)
        end = "".join(f"{last:.1%}" for last in finite(averaged)[-1:])
        lines.append(Line(xs=run.steps, ys=averaged, css=css, name=name, end=end))
    return Chart(title="Waiting, share of the step", lines=lines, x_range=run.x_range, from_zero=True, format="percent").figure()


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def other_metrics(run: Run) -> str:
    """Return a chart for each other number in the training records."""
    names = sorted({key for record in run.train for key, value in record.items() if _is_other(key) and is_number(value)})
    figures = "".join(_points_figure(run, name) for name in names)
    return section("More measurements", f'<div class="charts">{figures}</div>') if figures else ""


def _is_other(key: str) -> bool:
    """Return whether no other section of the page shows a number."""
    return key not in _SHOWN and not key.startswith("experts/")


def _points_figure(run: Run, key: str) -> str:
    """Return the figure of one number, with dots if only some steps have it, or "" if no step has a finite value."""
    known = [(record["step"], record[key]) for record in run.train if is_number(record.get(key)) and math.isfinite(record[key])]
    if not known:
        return ""
    xs, ys = [at for at, _ in known], [float(value) for _, value in known]
    line = Line(xs=xs, ys=ys, css="accent", dots=len(known) <= len(run.train) // 2)
    chart = Chart(title=key, lines=[line], x_range=run.x_range)
    return chart.figure(chart.text(ys[-1]))


def events_of(run: Run) -> list[Event]:
    """Return the events that the large chart marks."""
    return [
        *(Event(step, "restart") for step in _apart(run.restarts, run.last_step)),
        *(Event(step, "checkpoint") for step in _apart(run.checkpoints, run.last_step)),
        *(Event(step, "skipped") for step in _apart(run.skipped, run.last_step)),
    ]


def _apart(steps: Sequence[int], last_step: int) -> list[int]:
    """Return the steps without those whose marks would overlap: of thousands of checkpoints in a long run, about a hundred are drawn."""
    by_place = {step * _MAX_EVENTS // max(1, last_step): step for step in steps}
    return list(by_place.values())


def event_note(run: Run) -> str:
    """Return the legend of the marks, with the number of each kind, or "" for a run without events."""
    counted = (
        ("restart", "\u250a", len(run.restarts), "restart", "restarts"),
        ("checkpoint", "\u25b4", len(run.checkpoints), "checkpoint", "checkpoints"),
        ("skipped", "\u2715", len(run.skipped), "step skipped", "steps skipped"),
    )
    keys = [
        f'<span class="key"><b class="{css}">{sign}</b> {count:,} {one if count == 1 else many}</span>'
        for css, sign, count, one, many in counted
        if count
    ]
    return f'<p class="note">{" ".join(keys)}</p>' if keys else ""


def smoothing_width(num_values: int) -> int:
    """Return the width of the running mean: an odd number of steps, about a fiftieth of the run."""
    return 1 if num_values < 20 else num_values // 50 // 2 * 2 + 3


def not_finite(run: Run, key: str) -> list[float]:
    """Return the steps at which a number is NaN or infinite."""
    return [record["step"] for record in run.train if record.get(key) is not None and not math.isfinite(record[key])]


def end_value(ys: Values, window: int = 1) -> str:
    """Return the mean of a curve's last ``window`` values for its legend."""
    known = finite(ys[-window:]) or finite(ys)
    return f"{math.fsum(known) / len(known):.2f}" if known else ""
