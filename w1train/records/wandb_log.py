"""Weights & Biases: the same records as metrics.jsonl, under names that read well in its charts.

wandb is imported when a run starts, and only then. Training never depends on it: what goes wrong there is said once, as a
warning, and the run goes on with metrics.jsonl alone.
"""

from __future__ import annotations

import logging
import os
import secrets
import string
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from w1train.records.average_comparison import COLUMNS
from w1train.runtime.files import write_text
from w1train.runtime.masking import mask

logger = logging.getLogger(__name__)

ResolvedMode = Literal["online", "offline", "disabled"]
Mode = Literal["auto"] | ResolvedMode

RUN_ID_FILE = "wandb_run_id"

# "samples" is the table of generated text; the count goes by Megatron's name.
_RENAMED = {
    "samples": "consumed_samples",
    "time/step_seconds": "step_seconds",
    "time/tokens_per_second": "tokens_per_second",
    "time/tflops_per_second": "tflops",
    "time/mfu": "mfu",
    "time/data_wait_seconds": "data_wait_seconds",
    "time/communication_seconds": "communication_seconds",
    "time/memory_gib": "memory_gib",
    "time/seconds": "seconds",
}
_LEFT_OUT = {
    "train": ("kind", "step", "stage"),
    "validation": ("kind", "step", "stage", "tokens", "block_size"),
    # The average's own numbers stay; lists and names are for metrics.jsonl.
    "average": ("kind", "step", "tokens", "checkpoint", "metric", "members", "best_member", *(f"member_{name}" for name in COLUMNS)),
}
_PREFIXES = {"train": "", "validation": "validation/", "average": "average/"}

_TABLE_COLUMNS = ("step", "tokens", "prompt", "text")
# Without it wandb waits for a network that is down as long as that is: longer than a stopped run has (health.stop_timeout), and than
# srun leaves the last rank. What is not sent by then stays on the disk.
_FINISH_SECONDS = 60.0
# A table is sent whole each time it grows.
_MAX_TABLE_ROWS = 200


class WandbLogger:
    """Sends records and samples to one W&B run. Rank 0 only."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        mode: Mode,
        project: str,
        name: str,
        config: dict[str, Any],
        validation_timesteps: Sequence[float],
        stages: Sequence[str] = (),
    ) -> None:
        """Start (or, in a run directory that has one already, continue) the W&B run.

        Files go to ``run_dir/wandb``; ``config`` is attached whole; ``validation_timesteps`` name validation's loss_by_t; ``stages`` are
        the names of the schedule's, in its order.
        """
        self._validation_timesteps, self._stages = tuple(validation_timesteps), tuple(stages)
        self._run: Any = None
        self._first_step = 0
        self._place = ""
        self._samples: list[list[Any]] = []
        resolved = resolve_mode(mode)
        if resolved != "disabled":
            self._guarded("start", lambda: self._start(Path(run_dir), resolved, project, name, config))

    @property
    def active(self) -> bool:
        """Whether records go anywhere."""
        return self._run is not None

    def log(self, record: dict[str, Any]) -> None:
        """Send a record of metrics.jsonl at its own step."""
        if self.active and record["step"] >= self._first_step:
            metrics = wandb_metrics(record, self._validation_timesteps, self._stages)
            self._guarded("log", lambda: self._run.log(metrics, step=record["step"]))

    def log_samples(self, samples: Sequence[dict[str, Any]]) -> None:
        """Send records of samples.jsonl, all of one step, as a table; the table holds the earlier ones of this process too,
        because W&B shows only the last table of a run."""
        if self.active and samples:
            rows = [[sample[column] for column in _TABLE_COLUMNS] for sample in samples]
            self._samples = [*self._samples, *rows][-_MAX_TABLE_ROWS:]
            self._guarded("log samples", lambda: self._log_table(samples[-1]["step"]))

    def close(self, exit_code: int = 0) -> None:
        """Finish the run; ``exit_code`` other than 0 marks it as failed. Waits for uploads when online, a minute at most."""
        if self.active:
            run, self._run = self._run, None
            started = time.monotonic()
            self._guarded("finish", lambda: run.finish(exit_code=exit_code))
            if time.monotonic() - started >= _FINISH_SECONDS:
                logger.warning("W&B may not have sent all within %.0f s; send the rest with: wandb sync %s", _FINISH_SECONDS, self._place)

    def _start(self, run_dir: Path, mode: ResolvedMode, project: str, name: str, config: dict[str, Any]) -> None:
        # wandb falls back to a temporary directory without a word that would be seen; better to know.
        _require_writable(run_dir / "wandb")
        run_id, is_restart = _run_id(run_dir)
        # wandb reports its own crashes to its makers; a training cluster did not ask for that.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        # wandb keeps the command line.
        sys.argv[1:] = map(mask, sys.argv[1:])
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            disable_job_creation=True,
            # Reading the machine's description may ask the cloud's metadata address: not when offline.
            x_disable_machine_info=mode == "offline",
        )
        # Not in all releases that will do.
        if hasattr(settings, "finish_timeout"):
            settings.finish_timeout = _FINISH_SECONDS
        self._run = wandb.init(
            project=project, name=name, id=run_id, resume="allow", mode=mode, dir=str(run_dir), config=config, settings=settings
        )
        # A run killed after its last checkpoint repeats steps that W&B has: it refuses them, one warning each.
        self._first_step = self._run.step
        self._place = self._run.settings.sync_dir
        _say_what_is_done(self._run, mode, is_restart)

    def _log_table(self, step: int) -> None:
        import wandb

        table = wandb.Table(columns=list(_TABLE_COLUMNS), data=self._samples)
        self._run.log({"samples": table}, step=step)

    def _guarded(self, action: str, call: Callable[[], None]) -> None:
        """Run ``call``; what wandb, the file system or the network does wrong ends the logging, not the training."""
        try:
            call()
        except Exception as error:
            if not _is_outside_our_code(error):
                raise
            self._run = None
            logger.warning(
                "W&B could not %s (%s: %s). Training goes on without W&B; metrics.jsonl has every record.",
                action,
                type(error).__name__,
                error,
            )


def resolve_mode(mode: Mode) -> ResolvedMode:
    """auto = online if WANDB_API_KEY is set, else offline."""
    if mode == "auto":
        return "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return mode


def wandb_metrics(record: dict[str, Any], validation_timesteps: Sequence[float] = (), stages: Sequence[str] = ()) -> dict[str, float]:
    """The W&B metrics of a record: loss, elbo, loss_by_t/0.05, tokens_per_second, mfu, ..., validation/elbo, ...

    What is no number is left out (W&B would draw nulls as text). Training's bins of t are named by their middle. A stage, a name, becomes a
    number that can be drawn: ``phase``, its place among ``stages``, counted from 1.
    """
    prefix = _PREFIXES[record["kind"]]
    metrics: dict[str, float] = {}
    for key, value in record.items():
        if key == "loss_by_t":
            centers = validation_timesteps if prefix else _bin_centers(len(value))
            for center, item in zip(centers, value, strict=True):
                metrics[f"{prefix}loss_by_t/{center:.3g}"] = item
        elif key not in _LEFT_OUT[record["kind"]]:
            metrics[prefix + _RENAMED.get(key, key)] = value
    if not prefix and record.get("stage") in stages:
        metrics["phase"] = stages.index(record["stage"]) + 1
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}


def _bin_centers(num_bins: int) -> list[float]:
    return [(index + 0.5) / num_bins for index in range(num_bins)]


def _require_writable(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write in {directory}")


def _run_id(run_dir: Path) -> tuple[str, bool]:
    """(id of the W&B run, whether it was there before): kept in the run directory, so that a restart continues the run."""
    path = run_dir / RUN_ID_FILE
    if path.exists() and (run_id := path.read_text(encoding="utf-8").strip()):
        return run_id, True
    alphabet = string.ascii_lowercase + string.digits
    run_id = "".join(secrets.choice(alphabet) for _ in range(8))
    write_text(path, run_id + "\n")
    return run_id, False


def _say_what_is_done(run: Any, mode: ResolvedMode, is_restart: bool) -> None:
    if mode == "online":
        logger.info("W&B %s run %s at %s", "continues" if is_restart else "starts", run.id, run.url)
        if run.step:
            logger.info("W&B has this run's records before step %d; they are not sent again", run.step)
        return
    # Every start writes a folder of its own; with --id they become one run, in the order of their dates.
    folders = Path(run.settings.sync_dir).parent / f"offline-run-*-{run.id}*"
    logger.info("W&B is offline: run %s is written to %s", run.id, run.settings.sync_dir)
    logger.info("send it with: wandb sync --id %s %s", run.id, folders)


def _is_outside_our_code(error: Exception) -> bool:
    """Whether wandb, the file system or the network failed. wandb documents few of its exceptions, and moves them between
    releases: they are known by where they are defined."""
    return isinstance(error, ImportError | OSError) or type(error).__module__.partition(".")[0] == "wandb"
