"""The results of the runs of `make post-training`, as tables and as claims that hold or do not hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.results_page import Table, Verdict
from benchmarks.post_training.accuracy import ANSWERS
from benchmarks.post_training.made_questions import TASKS
from w1train.config.errors import UserError
from w1train.config.reading import read_json_object
from w1train.reports.run_content import Run, read_run

PRETRAINED, TUNED, LONGER, CONFIDENT, PREFERRING = "demo_pretrain", "demo_sft", "demo_sft_longer", "demo_cap", "demo_dpo"
TITLES = {
    PRETRAINED: "pretrained",
    TUNED: "SFT",
    LONGER: "SFT, as long as CAP",
    CONFIDENT: "CAP",
    PREFERRING: "DPO",
}
"""The runs by name, in the order of training."""
FASTER = (TUNED, LONGER, CONFIDENT)
"""The runs whose tokens per pass are compared."""
LARGEST_BEFORE, SMALLEST_AFTER = 0.10, 0.90
"""Shares of right answers before and after SFT."""
SMALLEST_GAIN, LARGEST_LOSS = 1.3, 0.02
"""The factor of tokens per pass by CAP, and the share of right answers that it may cost."""
USUAL_THRESHOLD = 0.95
"""The default threshold of LLaDA2.0's published code, whose models were trained with CAP."""
SMALLEST_PREFERENCE = 0.75
"""The share of held-out pairs that DPO puts in the right order."""

Point = Mapping[str, Any]


@dataclass(slots=True)
class Results:
    """The finished runs by name, with their answers."""

    runs: Mapping[str, Run]
    answers: Mapping[str, Mapping[str, Any]]

    def tables(self) -> list[Table]:
        """Return all tables that have rows."""
        return [table for table in (self.answer_table(), self.curve_table(), self.preference_table()) if table.rows]

    def verdicts(self) -> list[Verdict]:
        """Return all claims that the results can decide."""
        return [*self.tuning_verdicts(), *self.speed_verdicts(), *self.preference_verdicts()]

    def answer_table(self) -> Table:
        """Return the share of right answers of each model, one token a pass."""
        rows = []
        for name, answers in self.answers.items():
            careful, summary = answers["one_token_a_pass"], self.runs[name].summary
            shares = (careful["accuracy"], *(careful["by_task"][task] for task in TASKS), *answers["greetings"].values())
            costs = (f"{summary['tokens_seen']:,}", f"{summary['wall_seconds']:.0f}")
            rows.append((TITLES[name], *(f"{share:.1%}" for share in shares), *costs))
        columns = ("model", "all tasks", *TASKS, "greetings in the preferred style", "in the other style", "characters read", "seconds")
        return Table("Right answers to held-out questions, one token a pass", columns, rows)

    def curve_table(self) -> Table:
        """Return accuracy and tokens per pass of each threshold."""
        compared = self._compared()
        thresholds = [point["threshold"] for point in self.answers[compared[0]]["curve"]] if compared else []
        by_threshold = {name: {point["threshold"]: point for point in self.answers[name]["curve"]} for name in compared}
        rows = []
        for threshold in thresholds:
            points = [by_threshold[name][threshold] for name in compared]
            rows.append(
                (f"{threshold}", *(text for point in points for text in (f"{point['accuracy']:.1%}", f"{point['tokens_per_pass']:.2f}")))
            )
        columns = [text for name in compared for text in (f"{TITLES[name]}: right", "tokens a pass")]
        return Table("Threshold decoding", ("threshold", *columns), rows)

    def preference_table(self) -> Table:
        """Return the validation on held-out pairs before, during and after DPO."""
        names = ("preference_accuracy", "preference_margin", "preference_loss")
        rows = [(f"{record['step']}", *(f"{record[name]:.3f}" for name in names)) for record in self.preference_records()]
        return Table("Preferences on held-out pairs", ("step", "accuracy", "margin", "loss"), rows)

    def preference_records(self) -> list[dict[str, Any]]:
        """Return the validation records of DPO."""
        return self.runs[PREFERRING].validation if PREFERRING in self.runs else []

    def tuning_verdicts(self) -> list[Verdict]:
        """Return whether the pretrained model cannot answer, and whether the tuned model can."""
        claims = (
            (PRETRAINED, lambda share: share < LARGEST_BEFORE, f"under {LARGEST_BEFORE:.0%}"),
            (TUNED, lambda share: share > SMALLEST_AFTER, f"over {SMALLEST_AFTER:.0%}"),
        )
        return [
            Verdict(f"{TITLES[name]}: {says} of the answers are right ({share:.1%})", holds(share))
            for name, holds, says in claims
            if name in self.answers
            for share in (self.answers[name]["one_token_a_pass"]["accuracy"],)
        ]

    def speed_verdicts(self) -> list[Verdict]:
        """Return whether CAP gives more tokens a pass than each other model: at the same threshold, and at the best threshold of each."""
        if TUNED not in self.answers or CONFIDENT not in self.answers:
            return []
        verdicts = []
        for name in self._compared()[:-1]:
            curves = [self.answers[each]["curve"] for each in (name, CONFIDENT)]
            usual = [next((point for point in curve if point["threshold"] == USUAL_THRESHOLD), None) for curve in curves]
            verdicts.append(_faster(name, f"threshold {USUAL_THRESHOLD}", *usual))
            verdicts.append(_faster(name, "the best threshold of each", *(fastest(curve, self.floor()) for curve in curves)))
        return verdicts

    def floor(self) -> float:
        """Return the share of right answers that a threshold must leave: LARGEST_LOSS less than SFT with one token a pass."""
        return self.answers[TUNED]["one_token_a_pass"]["accuracy"] - LARGEST_LOSS

    def preference_verdicts(self) -> list[Verdict]:
        """Return whether DPO puts held-out pairs in the right order."""
        records = self.preference_records()
        if not records:
            return []
        first, last = (record["preference_accuracy"] for record in (records[0], records[-1]))
        claim = f"DPO puts over {SMALLEST_PREFERENCE:.0%} of the held-out pairs in the right order: {first:.1%} became {last:.1%}"
        return [Verdict(claim, last > SMALLEST_PREFERENCE)]

    def _compared(self) -> list[str]:
        return [name for name in FASTER if name in self.answers]


def fastest(curve: list[Point], floor: float) -> Point | None:
    """Return the point with most tokens a pass among those with at least this share of right answers; None if no point has it."""
    return max((point for point in curve if point["accuracy"] >= floor), key=lambda point: point["tokens_per_pass"], default=None)


def _faster(name: str, where: str, before: Point | None, after: Point | None) -> Verdict:
    """Return whether CAP has enough more tokens a pass than another model, and loses no more answers than it may."""
    gain = after["tokens_per_pass"] / before["tokens_per_pass"] if before and after else 0.0
    keeps = before is not None and after is not None and after["accuracy"] >= before["accuracy"] - LARGEST_LOSS
    texts = [f"{TITLES[each]} {_described(point)}" for each, point in ((name, before), (CONFIDENT, after))]
    claim = (
        f"at {where}, CAP gives at least {SMALLEST_GAIN} times the tokens a pass of {TITLES[name]}, {gain:.2f} times: {', '.join(texts)}"
    )
    return Verdict(claim, gain >= SMALLEST_GAIN and keeps)


def _described(point: Point | None) -> str:
    if point is None:
        return "loses too many answers at every threshold"
    return f"{point['tokens_per_pass']:.2f} at threshold {point['threshold']} with {point['accuracy']:.1%} right"


def read_results(runs: Path) -> Results:
    """Read the finished runs of a directory, and their answers.

    Raises:
        UserError: no run has ended, or a file is not what was written.
    """
    found = {name: read_run(runs / name) for name in TITLES if (runs / name / "summary.json").is_file()}
    finished = {name: run for name, run in found.items() if run.finished}
    if not finished:
        raise UserError(f"{runs} has no finished training: `make post-training` trains {', '.join(TITLES)} there")
    paths = {name: runs / name / ANSWERS for name in finished}
    return Results(finished, {name: read_json_object(path, "answers of a model") for name, path in paths.items() if path.is_file()})
