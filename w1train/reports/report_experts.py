"""The section of a report about the experts of a mixture of experts: how evenly tokens are spread over them."""

from __future__ import annotations

from w1train.reports.chart import Cells, Chart, Line
from w1train.reports.plot_data import Values, finite, moving_average
from w1train.reports.report_metrics import curve_figure, end_value, smoothing_width
from w1train.reports.report_page import section
from w1train.reports.run_content import Run

_LOADS = {
    "experts/load": ("all tokens", "accent"),
    "experts/load_masked": ("masked", "second"),
    "experts/load_noisy": ("other noisy", "middle-run"),
    "experts/load_clean": ("clean stream", "early"),
}
_NOTE = (
    "A load is an expert's tokens divided by the mean over the experts of its layer: 1 is even. The curves show the largest load of a "
    "layer, as the mean over layers."
)


def experts(run: Run) -> str:
    """Return the charts of experts, or "" for a dense model."""
    if not finite(run.column("experts/load")):
        return ""
    small = [
        curve_figure(run, "experts/load_worst_layer", "Largest load of the worst layer", "times the mean"),
        curve_figure(run, "experts/rank_load", "Largest load of an expert-parallel rank", "times the mean"),
        curve_figure(run, "experts/unused", "Experts without a token", "", from_zero=True, form="percent"),
        curve_figure(run, "experts/bias_range", "Range of the bias", "", smooth=False, from_zero=True),
        curve_figure(run, "experts/auxiliary_loss", "Balance loss of routers", ""),
        curve_figure(run, "experts/router_z_loss", "Z-loss of routers", ""),
    ]
    charts = f'<div class="charts">{_loads_figure(run)}{_heat_figure(run)}{"".join(small)}</div>'
    return section("Experts", f'<p class="note">{_NOTE}</p>{charts}')


def _loads_figure(run: Run) -> str:
    """Return the curves of the largest loads, one for each kind of token."""
    window, lines = smoothing_width(len(run.train)), []
    for key, (name, css) in _LOADS.items():
        ys = run.column(key)
        if finite(ys):
            lines.append(Line(xs=run.steps, ys=moving_average(ys, window), css=css, name=name, end=end_value(ys, window)))
    return Chart(title="Largest load of an expert", lines=lines, x_range=run.x_range, height=250).figure(css="span2")


def _heat_figure(run: Run) -> str:
    """Return the heat map of the newest loads of all experts, or "" if no step has them."""
    step, loads = next(((record["step"], table) for record in reversed(run.train) if (table := record.get("experts/loads"))), (0, []))
    largest = max(finite(load for layer in loads for load in layer), default=0.0)
    if largest <= 0:
        return ""
    columns: list[Values] = [list(column) for column in zip(*loads, strict=True)]
    first, num_experts = _num_dense_layers(run), len(columns)
    numbers = [float(first + layer) for layer in range(len(loads))]
    range_of_layers = (float(first), float(first + len(loads)))
    cells = Cells([*range(num_experts + 1)], columns, numbers, (0.0, largest), range_of_layers, "layer")
    title = f"Load of each expert (x) in each layer (y), at step {step:,}"
    chart = Chart(title=title, lines=[], x_range=(0.0, float(num_experts)), x_label="expert", height=250, cells=cells)
    return chart.figure(css="span2", caption=f'0<span class="ramp"></span>{largest:.1f}')


def _num_dense_layers(run: Run) -> int:
    """Return the number of the first layer that has experts, by the configuration of the run; 0 if it does not tell."""
    found = run.settings
    for name in ("model", "experts", "num_dense_layers"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, int) and 0 <= found < 10_000 else 0
