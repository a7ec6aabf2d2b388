"""The content of a run directory, as its report reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from w1train.config.credentials import mask_urls
from w1train.config.reading import read_bounded, read_json_object
from w1train.config.serialization import read_mapping
from w1train.config.yaml_limits import LARGEST_YAML
from w1train.records.record_checks import check_events, check_metrics, check_samples, check_summary
from w1train.runtime.record_files import read_metrics

Record = dict[str, Any]


@dataclass(slots=True)
class Run:
    """The content of a run directory. The part of a file that does not exist (yet) is empty."""

    name: str
    train: list[Record]
    validation: list[Record]
    averages: list[Record]
    samples: list[Record]
    summary: Record
    config: str
    """The text of config.yaml."""
    settings: Mapping[Any, Any] | None
    """The mapping in config.yaml, whose keys and values are not checked; None if there is no such file."""
    events: list[Record] = field(default_factory=list)
    other: Run | None = None
    """The run whose validation is drawn beside this run's."""

    @property
    def last_step(self) -> int:
        return max([0, *(record["step"] for record in self.train[-1:] + self.validation[-1:])])

    @property
    def finished(self) -> bool:
        """Tell whether the run has a summary of all its steps. A summary with fewer steps than the metrics is from before the run was
        prolonged."""
        return bool(self.summary) and self.summary.get("steps", 0) >= self.last_step

    @property
    def x_range(self) -> tuple[float, float]:
        return 0.0, float(max(1, self.last_step))

    def column(self, key: str) -> list[float | None]:
        return [record.get(key) for record in self.train]

    @property
    def steps(self) -> list[float]:
        return [record["step"] for record in self.train]

    @property
    def restarts(self) -> list[int]:
        """The steps that the run was resumed from, by a start or a rewind."""
        return [event["step"] for event in self.events if event["event"] in ("start", "resume", "rewind")][1:]

    @property
    def checkpoints(self) -> list[int]:
        """The steps that were saved, ascending."""
        return sorted({event["step"] for event in self.events if event["event"] == "checkpoint"})

    @property
    def skipped(self) -> list[int]:
        """The steps at which the count of skipped steps rose."""
        found, before = [], 0
        for record in self.train:
            count = record.get("health/skipped_steps") or 0
            if count > before:
                found.append(record["step"])
            before = count
        return found


def read_run(run_dir: Path) -> Run:
    """Read metrics.jsonl, and those files of samples.jsonl, events.jsonl, summary.json and config.yaml that exist.

    Raises:
        FileNotFoundError: there is no metrics.jsonl.
        UserError: the content of a file is not what training writes.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        raise FileNotFoundError(f"{run_dir} is no run directory: it has no metrics.jsonl")
    records = _read_records(metrics, check_metrics)
    summary, config = run_dir / "summary.json", run_dir / "config.yaml"
    return Run(
        name=run_dir.resolve().name,
        train=[record for record in records if record.get("kind") == "train"],
        validation=[record for record in records if record.get("kind") == "validation"],
        averages=[record for record in records if record.get("kind") == "average"],
        samples=_read_records(run_dir / "samples.jsonl", check_samples),
        summary=_read_summary(summary) if summary.exists() else {},
        config=mask_urls(read_bounded(config, LARGEST_YAML).decode("utf-8", "replace")) if config.exists() else "",
        settings=read_mapping(config) if config.exists() else None,
        events=_read_records(run_dir / "events.jsonl", check_events),
    )


def _read_records(path: Path, check: Callable[[Path, list[Record]], None]) -> list[Record]:
    records = read_metrics(path) if path.exists() else []
    check(path, records)
    return records


def _read_summary(path: Path) -> Record:
    summary = read_json_object(path, "summary")
    check_summary(path, summary)
    return summary
