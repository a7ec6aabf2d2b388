"""metrics.jsonl, samples.jsonl and events.jsonl: the records that all else (resume, reports, summary) reads."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence

from w1train.records.sink import Record, RecordedRun, Sink
from w1train.runtime.clocks import SteadyTimeOfDay
from w1train.runtime.record_files import MetricsLog, recorded_steps

logger = logging.getLogger(__name__)


class JsonLinesSink(Sink):
    """The sink that appends to the run directory's three files. When steps are done again, it removes their metrics and samples first."""

    def __init__(self, run: RecordedRun) -> None:
        self._run = run
        self._files = contextlib.ExitStack()

    def start(self) -> None:
        """Open the files, cut them back to the checkpoint's step, and warn of what is missing."""
        directory = self._run.directory
        self._metrics = self._files.enter_context(MetricsLog(directory.metrics))
        self._samples = self._files.enter_context(MetricsLog(directory.samples))
        self.go_back(self._run.last_kept_step)
        self._warn_of_missing_records()
        # This file is never cut back, because it tells what really happened.
        self._events = self._files.enter_context(MetricsLog(directory.events))
        self._warn_of_a_clock_that_was_set_back()

    def record(self, record: Record) -> None:
        """Append to metrics.jsonl."""
        self._metrics.append(record)

    def record_samples(self, samples: Sequence[Record]) -> None:
        """Append to samples.jsonl."""
        for sample in samples:
            self._samples.append(sample)

    def record_event(self, event: Record) -> None:
        """Append to events.jsonl."""
        self._events.append(event)

    def go_back(self, step: int) -> None:
        """Drop the metrics and samples of later steps."""
        self._metrics.truncate_after(step)
        self._samples.truncate_after(step)

    def sync(self) -> None:
        """Wait until metrics and samples are on the disk: a power loss could otherwise keep a checkpoint and lose its records."""
        self._metrics.sync()
        self._samples.sync()

    def close(self, *, failed: bool) -> None:
        """Close the files."""
        self._files.close()

    def _warn_of_missing_records(self) -> None:
        """Warn of steps before the checkpoint that have no record: a resume writes the records of later steps alone."""
        path, step = self._run.directory.metrics, self._run.step
        recorded = recorded_steps(path, kind="train")
        missing = [number for number in range(1, step + 1) if number not in recorded]
        if missing:
            logger.warning(
                "%s has no records of %d of the %d steps before this start (step %d to %d): they are lost, or belong to another run",
                path,
                len(missing),
                step,
                missing[0],
                missing[-1],
            )

    def _warn_of_a_clock_that_was_set_back(self) -> None:
        """Warn if this start begins before the newest event. Only the times of one start are sure to follow each other."""
        newest = (self._events.newest() or {}).get("time")
        # Somebody else may have written the file.
        behind = newest - SteadyTimeOfDay()() if isinstance(newest, int | float) and math.isfinite(newest) else 0.0
        if behind > 0:
            path = self._run.directory.events
            logger.warning("the clock is %.0f s behind the newest event of %s: it was set back since then", behind, path)
