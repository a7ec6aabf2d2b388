"""The report of `make post-training`: right answers before and after SFT, tokens per pass before and after CAP, and preferences by DPO.

    make post-training
    python -m benchmarks.post_training.post_training_page runs/post_training --report

It reads what the runs and ``benchmarks.post_training.accuracy`` have written, and trains nothing. RUNS/report.html has the charts. With
--report the tables are also written to benchmarks/results/YYYY-MM-DD-post-training.md.
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
from benchmarks.post_training.post_training_results import (
    FASTER,
    PREFERRING,
    PRETRAINED,
    TITLES,
    TUNED,
    Results,
    read_results,
)
from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.reports.chart import Chart, Line
from w1train.reports.report_page import POINTER_NOTE, contents, page, section
from w1train.runtime.command import command
from w1train.runtime.files import write_text

_TITLE = "Post-training on questions that a prompt decides"
_COMMAND = "make post-training; python -m benchmarks.post_training.post_training_page {runs} --report"
_TUNING_NOTE = (
    'The texts of the pretraining say what the answers are ("dacb in order is abcd."), and ask no question. SFT learns from questions '
    'with answers ("sort: dacb"). The words, sums and names of the held-out questions occur in no text for training. An answer is right '
    "if it is the expected text, up to its end. Answers are greedy."
)
_SPEED_NOTE = (
    "Each pass decides all tokens that are more probable than a threshold, and at least one. A token is a character of an answer or its "
    'end; passes that only decide the fill after the end count too. CAP trains the model of SFT on the same questions, and "SFT, as long '
    'as CAP" does the same without the entropy of right predictions in its loss. The models are compared at the same '
    "threshold, and each at its best threshold, which gives most tokens a pass while at most 2 points of SFT's right answers with one "
    "token a pass are lost. The best threshold is chosen on the same questions, for each model alike."
)
_PREFERENCE_NOTE = (
    "A greeting has two right answers. SFT has seen both equally often, whoever is greeted. The preferred answer depends on whether "
    "the person has a title. A held-out pair is in the right order if the reward of the preferred answer, by which its ELBO exceeds that "
    "of the reference, is the larger one. Before the first step all rewards are 0, and such a pair counts as half."
)


def write_page(results: Results, runs: Path) -> Path:
    """Write RUNS/report.html, and return its path."""
    sections = [_tuning(results), _speed(results), _preferences(results)]
    path = runs / "report.html"
    body = f"<header><h1>{_TITLE}</h1></header>"
    names = [runs / name for name in results.runs]
    write_text(path, page(path, names, _TITLE, "\n".join([body, contents(sections), *sections])))
    return path


def _tuning(results: Results) -> str:
    shown = [name for name in (PRETRAINED, TUNED) if name in results.answers]
    samples = "".join(_example(name, example) for name in shown for example in results.answers[name]["examples"])
    parts = [html_note(_TUNING_NOTE), html_verdicts(results.tuning_verdicts()), html_table(results.answer_table())]
    return section("SFT", "".join([*parts, f'<div class="samples">{samples}</div>']))


def _example(name: str, example: dict[str, str]) -> str:
    right = "right" if example["reply"] == example["answer"] else f"wrong, right is {example['answer']}"
    text = html.escape(f"{example['prompt']}\n{example['reply']}")
    return f'<article class="sample"><h3>{html.escape(f"{TITLES[name]}: {right}")}</h3><pre>{text}</pre></article>'


def _speed(results: Results) -> str:
    lines = []
    for index, name in enumerate(name for name in FASTER if name in results.answers):
        points = sorted(results.answers[name]["curve"], key=lambda point: point["tokens_per_pass"])
        xs, ys = ([point[key] for point in points] for key in ("tokens_per_pass", "accuracy"))
        lines.append(Line(xs=xs, ys=ys, css=f"series-{index}", dots=True, name=TITLES[name], end=f"{xs[-1]:.2f} at most"))
    if not lines:
        return ""
    ends = (min(line.xs[0] for line in lines), max(line.xs[-1] for line in lines))
    chart = Chart(
        title="Right answers over tokens a pass, one dot for each threshold",
        lines=lines,
        x_range=ends,
        x_label="tokens a pass",
        height=360,
        format="percent",
        reference=(results.floor(), "2 points below SFT") if TUNED in results.answers else None,
    )
    figure = f'<div class="charts">{chart.figure(css="span")}</div>'
    parts = [html_note(f"{_SPEED_NOTE} {POINTER_NOTE}"), html_verdicts(results.speed_verdicts()), figure, html_table(results.curve_table())]
    return section("CAP", "".join(parts))


def _preferences(results: Results) -> str:
    records = results.preference_records()
    if not records:
        return ""
    xs, ys = [record["step"] for record in records], [record["preference_accuracy"] for record in records]
    line = Line(xs=xs, ys=ys, css="series-0", dots=True, name=TITLES[PREFERRING], end=f"{ys[-1]:.1%}")
    chart = Chart(title="Held-out pairs in the right order", lines=[line], x_range=(0.0, float(xs[-1])), height=260, format="percent")
    figure = f'<div class="charts">{chart.figure(css="span")}</div>'
    parts = [html_note(_PREFERENCE_NOTE), html_verdicts(results.preference_verdicts()), figure, html_table(results.preference_table())]
    return section("DPO", "".join(parts))


@command("benchmarks.post_training.post_training_page")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, or 2 for bad input."""
    parser = ArgumentParser(
        prog="python -m benchmarks.post_training.post_training_page", description="Report what make post-training has trained."
    )
    parser.add_argument("runs", type=Path, metavar="RUNS", help="the directory of the run directories, such as runs/post_training")
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
        where = environment(_COMMAND.format(runs=options.runs))
        notes = "\n\n".join([_TUNING_NOTE, _SPEED_NOTE, _PREFERENCE_NOTE, verdict_lines(verdicts)])
        print(write_report("post-training", _TITLE, [*tables, where], notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
