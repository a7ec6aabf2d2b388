"""What a run directory holds, as its report reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from w1train.training.metrics_log import read_metrics
from w1train.training.plot_data import finite

Record = dict[str, Any]


@dataclass(slots=True)
class Run:
    """What a run directory holds; empty where a file is not there (yet)."""

    name: str
    train: list[Record]
    validation: list[Record]
    averages: list[Record]
    samples: list[Record]
    summary: Record
    config: str
    events: list[Record] = field(default_factory=list)
    other: Run | None = None
    """A run to compare this one with."""

    @property
    def last_step(self) -> int:
        return max([0, *(record["step"] for record in self.train[-1:] + self.validation[-1:])])

    @property
    def finished(self) -> bool:
        """A summary older than the metrics is that of an earlier, shorter run."""
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
        """The steps that later starts, and rewinds, went on from."""
        return [event["step"] for event in self.events if event["event"] in ("start", "resume", "rewind")][1:]

    @property
    def checkpoints(self) -> list[int]:
        """The steps that were saved, ascending."""
        return sorted({event["step"] for event in self.events if event["event"] == "checkpoint"})

    @property
    def skipped(self) -> list[int]:
        """The steps at which the count of skipped ones rose."""
        found, before = [], 0
        for record in self.train:
            count = record.get("health/skipped_steps") or 0
            if count > before:
                found.append(record["step"])
            before = count
        return found


def read_run(run_dir: Path) -> Run:
    """Read what is there of metrics.jsonl, samples.jsonl, events.jsonl, summary.json and config.yaml."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        raise FileNotFoundError(f"{run_dir} is no run directory: it has no metrics.jsonl")
    records = read_metrics(metrics)
    samples, summary, config = run_dir / "samples.jsonl", run_dir / "summary.json", run_dir / "config.yaml"
    events = run_dir / "events.jsonl"
    return Run(
        name=run_dir.resolve().name,
        train=[record for record in records if record.get("kind") == "train"],
        validation=[record for record in records if record.get("kind") == "validation"],
        averages=[record for record in records if record.get("kind") == "average"],
        samples=read_metrics(samples) if samples.exists() else [],
        summary=json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {},
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        events=read_metrics(events) if events.exists() else [],
    )


def median(values: list[float | None]) -> float | None:
    """Of the finite ones; None where there is none."""
    ordered = sorted(finite(values))
    return ordered[len(ordered) // 2] if ordered else None
