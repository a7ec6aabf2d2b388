"""The results of the runs of `make processes`, as tables and as claims that hold or do not hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common.results_page import Table, Verdict
from benchmarks.processes.trainings import CORRECTION, CORRECTIONS, FAMILIES, JUDGE, NUM_EPOCHS, PROCESSES, repeated_name
from w1train.config.errors import UserError
from w1train.config.reading import read_json_object
from w1train.reports.run_content import Run, read_run

_REPEATED = {JUDGE: "autoregression", "mdlm": "masked noise"}
_SMALL_GAIN = 0.01
"""Bits per character that count as no change."""


@dataclass(slots=True)
class Results:
    """The finished runs by name, and the result of self-correction if there is one."""

    runs: Mapping[str, Run]
    correction: dict[str, Any] | None

    def tables(self) -> list[Table]:
        """Return all tables that have rows."""
        tables = [self.process_table(), self.repeated_table()]
        if self.correction is not None:
            tables += [self.detection_table(), self.correction_table()]
        return [table for table in tables if table.rows]

    def verdicts(self) -> list[Verdict]:
        """Return all claims that the results can decide."""
        return [*self.order(), *self.repeated_verdicts(), *(self.correction_verdicts() if self.correction is not None else ())]

    def process_table(self) -> Table:
        """Return the bits per character of each process."""
        rows = []
        for training in PROCESSES:
            if (run := self.runs.get(training.name)) is not None:
                published = "" if training.published is None else f"{training.published:.2f}"
                values = (run.summary["num_parameters"], run.summary["tokens_seen"], run.summary["wall_seconds"])
                numbers = (f"{_last(run):.3f}", f"{_last_fall(run):.3f}", published)
                rows.append((training.title, training.family, *numbers, *(f"{value:,.0f}" for value in values)))
        measured = ("bits per character", "fall since the validation before")
        columns = ("process", "family", *measured, "published for text8", "parameters", "characters read", "seconds")
        return Table("Bits per character after training", columns, rows)

    def order(self) -> list[Verdict]:
        """Return for each two neighbouring families of the published order whether every process of the first is better."""
        found = {family: [_last(run) for run in self._of_family(family)] for family in FAMILIES}
        known = [(family, values) for family, values in found.items() if values]
        return [
            Verdict(f"{first}, {_range(better)}, is better than {second}, {_range(worse)}", max(better) < min(worse))
            for (first, better), (second, worse) in pairwise(known)
        ]

    def repeated_runs(self) -> list[tuple[str, Run]]:
        """Return the runs on new text and on repeated text, with their names in charts."""
        named = []
        for name, title in _REPEATED.items():
            named.append((name, f"{title}, new text"))
            named += [(repeated_name(name, number), f"{title}, {number} epoch{'s' * (number > 1)}") for number in (NUM_EPOCHS, 1)]
        return [(title, self.runs[name]) for name, title in named if name in self.runs]

    def repeated_table(self) -> Table:
        """Return the best and the last validation of each run on new and on repeated text."""
        rows = [(title, f"{_best(run):.3f}", f"{_last(run):.3f}", f"{_last(run) - _best(run):+.3f}") for title, run in self.repeated_runs()]
        return Table("Repeated data: validation, bits per character", ("", "best", "last", "last - best"), rows)

    def repeated_verdicts(self) -> list[Verdict]:
        """Return whether each kind of model still improves when it reads the small corpus again and again."""
        verdicts = []
        for name, title in _REPEATED.items():
            run = self.runs.get(repeated_name(name, NUM_EPOCHS))
            if run is not None:
                rise = _last(run) - _best(run)
                claim = f"{title} ends {NUM_EPOCHS} epochs at its best validation (it is {rise:.3f} above it)"
                verdicts.append(Verdict(claim, rise < _SMALL_GAIN))
        return verdicts

    def correction_table(self) -> Table:
        """Return what self-correction has done to the texts."""
        assert self.correction is not None
        rows = [
            (
                title,
                *(f"{numbers[name]:.1%}" for name in ("wrong", "repaired", "damaged")),
                f"{numbers['fewer']:+.2f} +- {numbers['fewer_error']:.2f}",
                f"{numbers['bits_per_character']:.3f}",
                f"{numbers['entropy']:.3f}",
            )
            for title, numbers in self.correction["texts"].items()
        ]
        columns = (
            "texts",
            "wrong characters",
            "repaired",
            "damaged",
            "wrong characters that a text has lost",
            "bits per character under autoregression",
            "entropy of characters",
        )
        return Table(f"Self-correction of {self.correction['num_texts']} texts of {self.correction['length']} characters", columns, rows)

    def correction_verdicts(self) -> list[Verdict]:
        """Return whether the models that were trained on wrong tokens improve texts, and whether the other model does, by each reviser."""
        assert self.correction is not None
        texts = self.correction["texts"]
        before = texts["with wrong characters"]
        verdicts = []
        for each in CORRECTIONS:
            after = texts[f"corrected: {each.title}"]
            has_improved = after["wrong"] < before["wrong"] and after["bits_per_character"] < before["bits_per_character"]
            says = "improves the texts" if each.improves else "does not improve the texts"
            wrong = f"{before['wrong']:.1%} of the characters were wrong, and {after['wrong']:.1%} are"
            bits = f"{before['bits_per_character']:.2f} bits per character became {after['bits_per_character']:.2f}"
            verdicts.append(Verdict(f"{each.run} ({each.title}) {says}: {wrong}; {bits}", has_improved == each.improves))
        return verdicts

    def detection_table(self) -> Table:
        """Return how well each model finds the wrong characters."""
        assert self.correction is not None
        found = self.correction["detection"].items()
        rows = [(name, f"{areas['present']:.3f}", f"{areas['new']:.3f}") for name, areas in found]
        columns = ("training", "by the improbability of the present character", "by the probability of the new character")
        return Table("Finding wrong characters: area under the ROC curve (0.5 = by chance)", columns, rows)

    def _of_family(self, family: str) -> list[Run]:
        return [self.runs[training.name] for training in PROCESSES if training.family == family and training.name in self.runs]


def read_results(runs: Path) -> Results:
    """Read the finished runs of a directory.

    Raises:
        UserError: no run has ended, or a file is not what was written.
    """
    names = [training.name for training in PROCESSES]
    names += [repeated_name(name, number) for name in _REPEATED for number in (1, NUM_EPOCHS)]
    found = {name: read_run(runs / name) for name in names if (runs / name / "summary.json").is_file()}
    finished = {name: run for name, run in found.items() if run.finished and run.validation}
    if not finished:
        raise UserError(f"{runs} has no finished training: `make processes` trains {', '.join(names)} there")
    path = runs / CORRECTION
    return Results(finished, read_json_object(path, "result of self-correction") if path.is_file() else None)


def _last(run: Run) -> float:
    return run.validation[-1]["elbo_bits_per_byte"]


def _last_fall(run: Run) -> float:
    """Return by how much the last validation is below the validation before it: near 0 where a run has learned what it can."""
    return run.validation[-2]["elbo_bits_per_byte"] - _last(run) if len(run.validation) > 1 else 0.0


def _best(run: Run) -> float:
    return min(record["elbo_bits_per_byte"] for record in run.validation if record["step"] > 0)


def _range(values: list[float]) -> str:
    """Write the smallest and the largest value, or the single value."""
    return f"{values[0]:.3f}" if len(values) == 1 else f"{min(values):.3f} to {max(values):.3f}"
