"""The tables, plot and verdicts of benchmarks.attention."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.attention.measure import Measured
from benchmarks.common.plot import Bar, bar_chart
from benchmarks.common.records import Results
from benchmarks.common.results_page import Table

NOTES = """\
Forward and backward of one layer's attention on one sample in bf16, all sides of a workload in turns on the same random inputs, L2
flushed before each forward pass; medians, timed by events on the GPU. Packed samples have documents of log-normal lengths (median 512 at
4,096 tokens and more). Blocks have two streams, twice the rows.

*Visible TFLOP/s* count the pairs that the mask lets through, 4 operations a pair, head and channel forward and 10 backward (the scores are
computed again); those of a *dense* side count all pairs. *Of dense* is the ratio of a side's visible TFLOP/s to those of its own library's
kernel without a mask on the same shapes, in this run. *cudnn* is cudnn.flex_attention, *cudnn full plan* the same where everything is
visible, *cudnn dense* cuDNN's own kernel through torch. *cudnn bias* adds the mask to the scores, the way of LLaDA2.0; for blocks, *te*
adds it too. *unfused* keeps all scores in bf16. *Memory* is what a forward and backward pass held at most beyond its inputs, with the plan
or mask. *Error* is the largest relative error of output and gradients against an explicit softmax in fp32."""

_KEY = "blocks of 32, one document, 4096"
_COLUMNS = ("side", "forward, ms", "backward, ms", "visible TFLOP/s", "of dense", "memory, GiB", "plan, ms", "error")


def tables(measured: Sequence[Measured]) -> list[Table]:
    """Return a short table of all workloads, then a table for each workload."""
    return [_summary(measured), *(_of_workload(name, rows) for name, rows in _by_workload(measured).items())]


def _by_workload(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    found: dict[str, list[Measured]] = {}
    for row in measured:
        found.setdefault(row.workload, []).append(row)
    return found


def _summary(measured: Sequence[Measured]) -> Table:
    names = list(dict.fromkeys(row.side for row in measured))
    served = [name for name in names if any(row.side == name and row.tflops is not None for row in measured)]
    rows = []
    for workload, members in _by_workload(measured).items():
        speeds = {row.side: row.tflops for row in members}
        rows.append((workload, *(_shown(speeds.get(name), "{:.3g}") for name in served)))
    return Table("Visible TFLOP/s, forward and backward", ("workload", *served), rows)


def _of_workload(name: str, rows: Sequence[Measured]) -> Table:
    return Table(name, _COLUMNS, [_row(row, rows) for row in rows])


def _row(row: Measured, rows: Sequence[Measured]) -> tuple[str, ...]:
    if row.seconds is None:
        return (f"{row.side}: {row.reason}".replace("|", "/"), *[""] * (len(_COLUMNS) - 1))
    return (
        row.side,
        f"{1e3 * statistics.median(row.forward):.3f}",
        f"{1e3 * statistics.median(row.backward):.3f}",
        _shown(row.tflops, "{:.3g}"),
        _shown(of_dense(row, rows), "{:.1%}"),
        _shown(None if row.memory is None else row.memory / 2**30, "{:.3f}"),
        _shown(None if row.plan is None else 1e3 * row.plan, "{:.2f}"),
        _shown(row.error, "{:.1e}"),
    )


def _shown(value: float | None, number: str) -> str:
    return "" if value is None else number.format(value)


def of_dense(row: Measured, rows: Sequence[Measured]) -> float | None:
    """Return a side's visible TFLOP/s over those of its library's dense kernel, or None if one of them is missing."""
    dense = next((other.tflops for other in rows if other.side == row.dense), None)
    return None if dense is None or row.tflops is None else row.tflops / dense


def key_results(measured: Sequence[Measured]) -> Results:
    """Return the results that are compared with other runs: those of all sides that have numbers."""
    results: Results = {}
    for workload, rows in _by_workload(measured).items():
        for row in rows:
            if row.seconds is not None:
                results[f"{workload}: {row.side}"] = {
                    "forward_ms": 1e3 * statistics.median(row.forward),
                    "backward_ms": 1e3 * statistics.median(row.backward),
                    "visible_tflops": row.tflops,
                    "dense_fraction": of_dense(row, rows),
                    "memory_gib": None if row.memory is None else row.memory / 2**30,
                    "plan_ms": None if row.plan is None else 1e3 * row.plan,
                }
    return results


def verdicts(measured: Sequence[Measured], workload: str = _KEY) -> list[str]:
    """Return a line for each claim about cudnn with blocks of 32 and 4,096 tokens, which says whether it holds."""
    rows = _by_workload(measured).get(workload, [])
    by_side = {row.side: row for row in rows}
    cudnn = by_side.get("cudnn")
    if cudnn is None or cudnn.seconds is None:
        why = f"{workload} was not measured" if cudnn is None else f"cudnn has no numbers ({cudnn.reason})"
        claims = ("1.5 x flex", "3 x the dense mask", "80 % of dense", "10 % of unfused's memory")
        return [f"not shown, as {why}: {claim}" for claim in claims]
    biased = [row for name in ("cudnn bias", "te") if (row := by_side.get(name)) is not None and row.seconds is not None]
    fastest = min(biased, key=lambda row: row.seconds or 0.0, default=None)
    return [
        _verdict("cudnn is >= 1.5 x as fast as flex, forward and backward", _speedup(cudnn, by_side.get("flex")), 1.5, "{:.2f} x"),
        _verdict("cudnn is >= 3 x as fast as the fastest dense mask", _speedup(cudnn, fastest), 3.0, "{:.2f} x"),
        _verdict("cudnn has >= 80 % of cuDNN's dense TFLOP/s on visible pairs", of_dense(cudnn, rows), 0.8, "{:.1%}"),
        _verdict("cudnn's memory is <= 10 % of unfused's", _memory_share(cudnn, by_side.get("unfused")), 0.1, "{:.1%}", at_most=True),
    ]


def _verdict(claim: str, value: float | None, bound: float, number: str, *, at_most: bool = False) -> str:
    if value is None:
        return f"not shown: {claim} (the other side has no numbers)"
    holds = value <= bound if at_most else value >= bound
    return f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}: {number.format(value)}"


def _speedup(one: Measured, other: Measured | None) -> float | None:
    return None if other is None or other.seconds is None or one.seconds is None else other.seconds / one.seconds


def _memory_share(one: Measured, other: Measured | None) -> float | None:
    return None if other is None or other.memory is None or one.memory is None else one.memory / other.memory


def chart(measured: Sequence[Measured]) -> str:
    """Return a chart of the visible TFLOP/s by workload, as SVG."""
    groups = []
    for workload, rows in _by_workload(measured).items():
        bars = [Bar(row.side, [(row.side, row.tflops)], f"{row.tflops:.3g}") for row in rows if row.tflops is not None]
        groups.append((workload, bars))
    return bar_chart("Attention, forward and backward", groups, "visible TFLOP/s (dense kernels: all pairs)")
