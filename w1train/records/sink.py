"""The interface of a sink, a place that a run's records go to. Each sink has a file of its own: JSON lines, W&B, TensorBoard, the console.

A new sink is a subclass of :class:`Sink` in a file of its own, and its name in ``SINKS`` (w1train/records/watch.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from w1train.config.schema import Config
from w1train.config.schema_operation import LoggingConfig
from w1train.runtime.run_directory import RunDirectory

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The run whose records a sink gets."""

    config: Config
    directory: RunDirectory
    step: int
    """Steps that were done before this start; 0 for a run that begins."""
    num_steps: int
    num_tokens: int
    description: Mapping[str, str]
    """Titles and values for people: model size, devices, data, batch size."""

    @property
    def last_kept_step(self) -> int:
        """The last step whose records this start keeps, because it writes the records of later steps again. It is -1 for a run that begins,
        which writes records of step 0."""
        return self.step if self.step > 0 else -1


class Sink:
    """A place that records go to. This class drops all records: a sink overrides the methods for the records that it wants.

    Every rank makes one sink of each kind, and only rank 0 calls the other methods. An exception that a sink raises ends the run. A sink
    that training does not need therefore catches the errors of its own library.
    """

    def __init__(self, run: RecordedRun) -> None:
        """Touch no file. Raise UserError if a package that the sink needs is missing."""

    @classmethod
    def is_wanted(cls, settings: LoggingConfig) -> bool:
        """Return whether the configuration asks for this sink."""
        return True

    def start(self) -> None:
        """Make ready to write, and forget the records of steps after ``run.last_kept_step``."""

    def record(self, record: Record) -> None:
        """Write a record of metrics.jsonl: a training step, a validation, or the comparison of an average."""

    def record_samples(self, samples: Sequence[Record]) -> None:
        """Write records of samples.jsonl, all of one step."""

    def record_event(self, event: Record) -> None:
        """Write a record of events.jsonl."""

    def go_back(self, step: int) -> None:
        """Forget the records of later steps than ``step``: the run does these steps again. Events stay."""

    def sync(self) -> None:
        """Bring the records to the disk, before a checkpoint says that their steps are done. Any thread may call this."""

    def close(self, *, failed: bool) -> None:
        """Stop writing. ``failed`` tells whether an error ends the run. This is also called if ``start`` has raised."""
