"""A run's records, which go to all sinks. Only rank 0 has sinks."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

from w1train.checkpoints.manifest import Progress
from w1train.records.console import ConsoleSink
from w1train.records.json_lines import JsonLinesSink
from w1train.records.sink import Record, RecordedRun, Sink
from w1train.records.summary import code_versions
from w1train.records.tensorboard import TensorBoardSink
from w1train.records.wandb_log import WandbSink
from w1train.runtime.clocks import SteadyTimeOfDay
from w1train.runtime.distributed import Ranks
from w1train.runtime.masking import mask

SINKS: tuple[type[Sink], ...] = (JsonLinesSink, ConsoleSink, WandbSink, TensorBoardSink)
"""All sinks, in the order in which they start and write: the files that a resume reads come first. W&B may start for a long time."""


class Watch:
    """A context manager that hands records to the sinks. On ranks other than 0 it drops them."""

    def __init__(self, run: RecordedRun, ranks: Ranks, progress: Progress, sinks: Sequence[type[Sink]] | None = None) -> None:
        """Make the sinks that the configuration wants. ``progress`` is the run's own object, so it changes while the run trains.

        Args:
            sinks: the sinks to choose from; None = all sinks.

        Raises:
            UserError: if a package that a sink needs is missing.
        """
        self._run, self._ranks, self.progress = run, ranks, progress
        wanted = [sink(run) for sink in (SINKS if sinks is None else sinks) if sink.is_wanted(run.config.logging)]
        self._sinks = wanted if ranks.is_main else []
        self._started = contextlib.ExitStack()
        self._time_of_day = SteadyTimeOfDay()

    def __enter__(self) -> Watch:
        """Start the sinks, and send the event of this start to each sink before the next sink starts. No file is touched before this
        call."""
        event = self._start_event() if self._sinks else {}
        with contextlib.ExitStack() as started:
            for sink in self._sinks:
                started.push(partial(_close, sink))
                sink.start()
                sink.record_event(event)
            self._started = started.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Close the sinks in the reverse order."""
        self._started.__exit__(kind, error, traceback)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Record a training step, a validation or the comparison of an average, at the run's current step."""
        samples = {"samples": self.progress.samples} if kind == "train" else {}
        record = {"kind": kind, "step": self.progress.step, **samples, "tokens": self._tokens(), **values}
        for sink in self._sinks:
            sink.record(record)

    def record_samples(self, samples: Sequence[tuple[str, str]]) -> None:
        """Record (prompt, text) pairs, at the run's current step."""
        where = {"step": self.progress.step, "tokens": self._tokens()}
        records = [{**where, "prompt": prompt, "text": text} for prompt, text in samples]
        for sink in self._sinks:
            sink.record_samples(records)

    def event(self, name: str, **values: Any) -> None:
        """Record an event, which is not a measurement (a start, a checkpoint), at the run's current step unless ``values`` has another
        step. Passwords in ``values`` are masked."""
        event = self._event(name, values)
        for sink in self._sinks:
            sink.record_event(event)

    def go_back(self) -> None:
        """Forget the records of steps after the run's current step, because the run does these steps again."""
        for sink in self._sinks:
            sink.go_back(self.progress.step)
        self.event("rewind")

    def sync(self) -> None:
        """Bring the records to the disk, before a checkpoint says that their steps are done. Any thread may call this."""
        for sink in self._sinks:
            sink.sync()

    def _start_event(self) -> Record:
        what = "resume" if self.progress.step > 0 else "start"
        world = {"host": socket.gethostname(), "world_size": self._ranks.world_size}
        return self._event(what, {**world, "git_commit": code_versions()["git_commit"]})

    def _event(self, name: str, values: dict[str, Any]) -> Record:
        shown = {key: mask(value) if isinstance(value, str) else value for key, value in values.items()}
        return {"step": self.progress.step, "event": name, "time": self._time_of_day(), **shown}

    def _tokens(self) -> int:
        return self.progress.samples * self._run.config.data.sequence_length


def _close(sink: Sink, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None) -> None:
    sink.close(failed=error is not None)
