"""The report of `make processes`: bits per character of each noise process, repeated data, and self-correction.

    make processes
    python -m benchmarks.processes.page runs/processes --report

It reads what the runs and ``benchmarks.processes.correct`` have written, and trains nothing. RUNS/report.html has the charts. With --report
the tables are also written to benchmarks/results/YYYY-MM-DD-processes.md.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import html
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.results_page import environment, html_note, html_table, html_verdicts, print_results, verdict_lines, write_report
from benchmarks.processes.results import Results, read_results
from benchmarks.processes.trainings import NUM_EPOCHS, PROCESSES
from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.reports.chart import Chart, Line
from w1train.reports.report_page import POINTER_NOTE, contents, page, section
from w1train.reports.run_content import Run
from w1train.runtime.command import command
from w1train.runtime.files import write_text

_TITLE = "Noise processes on the same text"
_COMMAND = "make processes; python -m benchmarks.processes.page {runs} --report"
_PROCESSES_NOTE = (
    "Every model has the same size, text, order of the text and number of characters; one seed each. The numbers are upper bounds on "
    "-log2 p of a character of held-out text, with the terms of both ends of the bound; autoregression's number is exact. GenMD4 reads "
    "each text twice, and therefore half as many texts."
)
_REPEATED_NOTE = (
    f"The small corpus is a part of the text, which the runs read once or {NUM_EPOCHS} times. The runs of {NUM_EPOCHS} epochs see as many "
    "characters as the runs on new text."
)
_CORRECTION_NOTE = (
    "All models revise the same texts, with the noise of p_u = 0.2 as the assumed noise. Conditional modes change a character only if the "
    "evidence of the whole text outweighs the character that is there, and end by themselves. GIDD's rule ranks changes by the "
    "probability of the new character, and gets as many changes as a text has wrong characters. The +- is the standard error over texts."
)


def write_page(results: Results, runs: Path) -> Path:
    """Write RUNS/report.html, and return its path."""
    sections = [_processes(results), _repeated(results), _correction(results)]
    names = [runs / name for name in results.runs]
    path = runs / "report.html"
    body = f"<header><h1>{_TITLE}</h1></header>"
    write_text(path, page(path, names, _TITLE, "\n".join([body, contents(sections), *sections])))
    return path


def _processes(results: Results) -> str:
    lines = [(training.title, results.runs[training.name]) for training in PROCESSES if training.name in results.runs]
    figure = _curves("Validation, bits per character", lines)
    parts = [html_note(f"{_PROCESSES_NOTE} {POINTER_NOTE}"), html_verdicts(results.order()), html_table(results.process_table()), figure]
    return section("Noise processes", "".join(parts))


def _repeated(results: Results) -> str:
    lines = results.repeated_runs()
    if not lines:
        return ""
    figure = _curves("Validation on the same held-out text, bits per character", lines)
    parts = [html_note(_REPEATED_NOTE), html_verdicts(results.repeated_verdicts()), html_table(results.repeated_table()), figure]
    return section("Repeated data", "".join(parts))


def _correction(results: Results) -> str:
    if results.correction is None:
        return ""
    examples = "".join(
        f'<article class="sample"><h3>{html.escape(title)}</h3><pre>{html.escape(text)}</pre></article>'
        for example in results.correction["examples"]
        for title, text in example.items()
    )
    tables = [html_table(results.detection_table()), html_table(results.correction_table())]
    parts = [html_note(_CORRECTION_NOTE), html_verdicts(results.correction_verdicts()), *tables, f'<div class="samples">{examples}</div>']
    return section("Self-correction", "".join(parts))


def _curves(title: str, runs: Sequence[tuple[str, Run]]) -> str:
    """Return the chart of the validations of runs over the characters that they have read, without those before the first step, whose
    values would leave no room for the others."""
    lines = []
    for index, (name, run) in enumerate(runs):
        records = [record for record in run.validation if record["step"] > 0]
        ys = [record["elbo_bits_per_byte"] for record in records]
        end = f"{ys[-1]:.3f}" if ys else ""
        lines.append(Line(xs=[record["tokens"] for record in records], ys=ys, css=f"series-{index}", dots=True, name=name, end=end))
    lines = [line for line in lines if line.xs]
    if not lines:
        return ""
    farthest = float(max(max(line.xs) for line in lines))
    chart = Chart(title=title, lines=lines, x_range=(0.0, farthest), x_label="characters read", height=360, format="exact")
    return f'<div class="charts">{chart.figure(css="span")}</div>'


@command("benchmarks.processes.page")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, or 2 for bad input."""
    parser = ArgumentParser(prog="python -m benchmarks.processes.page", description="Report what make processes has trained.")
    parser.add_argument("runs", type=Path, metavar="RUNS", help="the directory of the run directories, such as runs/processes")
    parser.add_argument("--report", action="store_true", help="write the dated report to benchmarks/results")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tables, verdicts = results.tables(), results.verdicts()
    print_results(tables, verdicts)
    print(write_page(results, options.runs))
    if options.report:
        notes = verdict_lines(verdicts)
        where = environment(_COMMAND.format(runs=options.runs))
        print(write_report("processes", _TITLE, [*tables, where], f"{_PROCESSES_NOTE}\n\n{_REPEATED_NOTE}\n\n{notes}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
