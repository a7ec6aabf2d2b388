"""TensorBoard: the same metrics under the same names as W&B's, in RUN/tensorboard."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from w1train.config.errors import UserError
from w1train.config.schema_operation import LoggingConfig
from w1train.records.chart_metrics import chart_metrics
from w1train.records.sink import Record, RecordedRun, Sink
from w1train.runtime.clocks import SteadyTimeOfDay

logger = logging.getLogger(__name__)

_FILES = "events.out.tfevents."


class TensorBoardSink(Sink):
    """The sink that writes records and samples as event files. Each start writes a file of its own."""

    def __init__(self, run: RecordedRun) -> None:
        """Raise UserError if the package is missing: the user would miss the files only at the end of the run."""
        if find_spec("tensorboard") is None:
            raise UserError(
                "logging.tensorboard is true, but tensorboard is not installed: pip install 'w1train[tensorboard]', or set it to false"
            )
        self._run = run
        self._directory = run.directory.path / "tensorboard"
        self._writer: Any = None

    @classmethod
    def is_wanted(cls, settings: LoggingConfig) -> bool:
        """Return whether logging.tensorboard is set."""
        return settings.tensorboard

    def start(self) -> None:
        """Begin the file of this start, and tell the user the command that shows it."""
        self._time_of_day = SteadyTimeOfDay()
        self._open(self._run.last_kept_step + 1)
        logger.info("look at it with: tensorboard --logdir %s", self._directory)

    def _open(self, first_step: int) -> None:
        """Begin a file. TensorBoard shows nothing that earlier files have of steps from ``first_step`` on: they are done again."""
        from torch.utils.tensorboard import SummaryWriter

        self._sort_after_older_files()
        # A thread of the writer writes records out every ten seconds: a run that is killed loses those of the last seconds.
        self._writer = SummaryWriter(str(self._directory), purge_step=first_step, flush_secs=10)

    def _sort_after_older_files(self) -> None:
        """Rename files whose names have a time in the future, so that they have an earlier time.

        TensorBoard reads files in the order of their names, which begin with the time of day. After a clock was set back, it would read the
        steps that are done again before the steps that were undone, and show the latter.
        """
        now, later = int(time.time()), []
        for path in self._directory.glob(f"{_FILES}*"):
            stamp, _, rest = path.name.removeprefix(_FILES).partition(".")
            if stamp.isdigit() and int(stamp) > now:
                later.append((int(stamp), rest, path))
        for place, (_, rest, path) in enumerate(sorted(later)):
            path.rename(path.with_name(f"{_FILES}{now - len(later) + place:010d}.{rest}"))
        if later:
            logger.info("renamed %d files of %s, which were of a later time than now: the clock was set back", len(later), self._directory)

    def record(self, record: Record) -> None:
        """Write the record's metrics at the record's own step."""
        config = self._run.config
        for name, value in chart_metrics(record, config.validation.timesteps, tuple(config.schedule.stages)).items():
            self._writer.add_scalar(name, value, record["step"], walltime=self._time_of_day())

    def record_samples(self, samples: Sequence[Record]) -> None:
        """Write the samples as text."""
        for number, sample in enumerate(samples, start=1):
            # Four spaces make a line Markdown's code, in which TensorBoard looks for no markup.
            text = "\n".join("    " + line for line in sample["text"].splitlines())
            text = text.encode("utf-8", "replace").decode()
            self._writer.add_text(f"samples/{number}", text, sample["step"], walltime=self._time_of_day())

    def go_back(self, step: int) -> None:
        """Begin another file. TensorBoard shows the later steps from this file, and not from the files before it."""
        self._writer.close()
        self._open(step + 1)

    def sync(self) -> None:
        """Hand everything to the operating system."""
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Close the file, if there is one."""
        if self._writer is not None:
            self._writer.close()
