"""TensorBoard: the same metrics under the same names as W&B's, in RUN/tensorboard."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from w1train.config.errors import UserError
from w1train.records.wandb_log import wandb_metrics
from w1train.runtime.clocks import SteadyTimeOfDay

logger = logging.getLogger(__name__)

_FILES = "events.out.tfevents."


def require_tensorboard() -> None:
    """Raises UserError if its package is not there: whoever asked for the files should not miss them at the end of a run."""
    if find_spec("tensorboard") is None:
        raise UserError(
            "logging.tensorboard is true, but tensorboard is not installed: pip install 'w1train[tensorboard]', or set it to false"
        )


class TensorBoardLogger:
    """Writes records and samples as event files. Rank 0 only."""

    def __init__(self, run_dir: str | Path, *, first_step: int, validation_timesteps: Sequence[float], stages: Sequence[str]) -> None:
        """Each start writes a file of its own. ``first_step`` is the first step that this start may write: TensorBoard then shows none of
        what an earlier start wrote from there on, for it is done again."""
        self._directory = Path(run_dir) / "tensorboard"
        self._time_of_day = SteadyTimeOfDay()
        self._names = (tuple(validation_timesteps), tuple(stages))
        self._open(first_step)
        logger.info("look at it with: tensorboard --logdir %s", self._directory)

    def _open(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._sort_after_older_files()
        # Written out every few seconds by a thread of its own: a run that is killed loses those.
        self._writer = SummaryWriter(str(self._directory), purge_step=first_step, flush_secs=10)

    def _sort_after_older_files(self) -> None:
        """TensorBoard reads files in the order of their names, which begin with the time of day: after a clock was set back, what is undone
        would come after what is done again. Older files of later times then get an earlier one."""
        now, later = int(time.time()), []
        for path in self._directory.glob(f"{_FILES}*"):
            stamp, _, rest = path.name.removeprefix(_FILES).partition(".")
            if stamp.isdigit() and int(stamp) > now:
                later.append((int(stamp), rest, path))
        for place, (_, rest, path) in enumerate(sorted(later)):
            path.rename(path.with_name(f"{_FILES}{now - len(later) + place:010d}.{rest}"))
        if later:
            logger.info("renamed %d files of %s, which were of a later time than now: the clock was set back", len(later), self._directory)

    def go_back(self, first_step: int) -> None:
        """Steps from this one on are done again without a new start, after a rewind."""
        self.close()
        self._open(first_step)

    def log(self, record: dict[str, Any]) -> None:
        """Write a record of metrics.jsonl at its own step."""
        for name, value in wandb_metrics(record, *self._names).items():
            self._writer.add_scalar(name, value, record["step"], walltime=self._time_of_day())

    def log_samples(self, samples: Sequence[dict[str, Any]]) -> None:
        """Write records of samples.jsonl, all of one step, as text."""
        for number, sample in enumerate(samples, start=1):
            # Indented by four: Markdown's code, in which nothing is markup.
            text = "\n".join("    " + line for line in sample["text"].splitlines())
            text = text.encode("utf-8", "replace").decode()
            self._writer.add_text(f"samples/{number}", text, sample["step"], walltime=self._time_of_day())

    def sync(self) -> None:
        """Hand everything to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
