"""Weights & Biases: the same records as metrics.jsonl, under names that read well in its charts.

wandb is imported when a run starts, and only then. Training never depends on it. If W&B's servers cannot be reached at the start, the run
is offline. Another error of W&B is one warning, after which the run goes on without W&B.
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
from typing import Any, Literal, cast

from w1train.config.schema_operation import LoggingConfig
from w1train.config.serialization import flatten
from w1train.records.chart_metrics import chart_metrics
from w1train.records.sink import Record, RecordedRun, Sink
from w1train.records.summary import code_versions
from w1train.runtime.files import write_text
from w1train.runtime.masking import mask

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline"]

RUN_ID_FILE = "wandb_run_id"

_TABLE_COLUMNS = ("step", "tokens", "prompt", "text")
_INIT_SECONDS = 15.0
"""The longest wait for W&B's servers at the start, unless WANDB_INIT_TIMEOUT sets another. wandb would wait for 90 s, and then give up."""
_FINISH_SECONDS = 60.0
"""The longest wait for uploads at the end. Without a limit, wandb waits until a network that is down comes back: longer than a stopped run
has (health.stop_timeout), and longer than srun leaves the last rank. Records that are not sent by then stay on the disk."""
_MAX_TABLE_ROWS = 200
"""wandb sends the whole table again each time that the table grows."""


class WandbSink(Sink):
    """The sink that sends records and samples to one W&B run."""

    def __init__(self, run: RecordedRun) -> None:
        self._recorded = run
        self._run: Any = None
        self._first_step = 0
        self._place = ""
        self._samples: list[list[Any]] = []

    @classmethod
    def is_wanted(cls, settings: LoggingConfig) -> bool:
        """Return whether W&B is not disabled."""
        return settings.wandb != "disabled"

    @property
    def is_active(self) -> bool:
        """Tell whether W&B takes records: it was started, and has not failed."""
        return self._run is not None

    def start(self) -> None:
        """Start a W&B run, or continue the W&B run whose id the run directory has. Its files go to ``wandb`` in the run directory. If W&B's
        servers cannot be reached, or refuse, the run is offline."""
        mode = self._recorded.config.logging.wandb
        assert mode != "disabled", "SINKS has asked is_wanted"
        self._guarded("start", lambda: self._initialize(resolve_mode(mode)))

    def record(self, record: Record) -> None:
        """Send the record's metrics at the record's own step."""
        if self.is_active and record["step"] >= self._first_step:
            config = self._recorded.config
            metrics = chart_metrics(record, config.validation.timesteps, tuple(config.schedule.stages))
            self._guarded("log", lambda: self._run.log(metrics, step=record["step"]))

    def record_samples(self, samples: Sequence[Record]) -> None:
        """Send the samples as a table. The table holds the earlier samples of this process too, because W&B shows only the last table of a
        run."""
        if self.is_active and samples:
            rows = [[sample[column] for column in _TABLE_COLUMNS] for sample in samples]
            self._samples = [*self._samples, *rows][-_MAX_TABLE_ROWS:]
            self._guarded("log samples", lambda: self._log_table(samples[-1]["step"]))

    def close(self, *, failed: bool) -> None:
        """Finish the W&B run, and wait for its uploads: a minute at most."""
        if self.is_active:
            run, self._run = self._run, None
            started = time.monotonic()
            self._guarded("finish", lambda: run.finish(exit_code=int(failed)))
            if time.monotonic() - started >= _FINISH_SECONDS:
                logger.warning("W&B may not have sent all within %.0f s; send the rest with: wandb sync %s", _FINISH_SECONDS, self._place)

    def _initialize(self, mode: Mode) -> None:
        run_dir = self._recorded.directory.path
        # If it cannot write here, wandb takes a temporary directory, and the user does not learn of it.
        _require_writable(run_dir / "wandb")
        run_id, is_restart = _run_id(run_dir)
        # wandb reports its own crashes to its makers, unless it is told not to.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        # wandb records the command line.
        sys.argv[1:] = map(mask, sys.argv[1:])
        failure = self._try_online(run_id) if mode == "online" else None
        if self._run is None:
            self._run = self._begin("offline", run_id)
        # A run that was killed after its last checkpoint repeats steps. W&B has records of these steps, and would warn of each record that
        # is sent again.
        self._first_step = self._run.step
        self._place = self._run.settings.sync_dir
        if self._run.offline:
            _log_offline_place(self._run, failure)
        else:
            _log_online_place(self._run, is_restart)

    def _try_online(self, run_id: str) -> Exception | None:
        """Start the run on W&B's servers, or return the error of W&B, the file system or the network that prevents it."""
        import wandb

        try:
            self._run = self._begin("online", run_id)
        except Exception as error:
            if not _is_outside_our_code(error):
                raise
            # wandb's service process would refuse the id, which it has in use.
            wandb.teardown()
            return error
        return None

    def _begin(self, mode: Mode, run_id: str) -> Any:
        import wandb

        config = self._recorded.config
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            disable_job_creation=True,
            # wandb may ask the cloud's metadata address for the machine's description, which an offline run must not do.
            x_disable_machine_info=mode == "offline",
        )
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            settings.init_timeout = _INIT_SECONDS
        # Some releases that pyproject.toml allows do not have this setting.
        if hasattr(settings, "finish_timeout"):
            settings.finish_timeout = _FINISH_SECONDS
        versions = {f"versions.{name}": value for name, value in code_versions().items()}
        return wandb.init(
            project=config.logging.wandb_project,
            name=config.name,
            id=run_id,
            resume="allow",
            mode=mode,
            dir=str(self._recorded.directory.path),
            config={**flatten(config), **versions},
            settings=settings,
        )

    def _log_table(self, step: int) -> None:
        import wandb

        table = wandb.Table(columns=list(_TABLE_COLUMNS), data=self._samples)
        self._run.log({"samples": table}, step=step)

    def _guarded(self, action: str, call: Callable[[], None]) -> None:
        """Run ``call``. An error of wandb, of the file system or of the network ends the logging to W&B, not the training."""
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
                reason_of(error),
            )


def resolve_mode(mode: Literal["auto"] | Mode) -> Mode:
    """Return the mode of logging.wandb; auto is online if WANDB_API_KEY is set, else offline."""
    if mode == "auto":
        return "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return mode


def _require_writable(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write in {directory}")


def _run_id(run_dir: Path) -> tuple[str, bool]:
    """Return the id of the W&B run, and whether the run directory had it. A restart reads it there, and continues the W&B run."""
    path = run_dir / RUN_ID_FILE
    try:
        if path.exists() and (run_id := path.read_text(encoding="utf-8").strip()):
            return run_id, True
    except UnicodeDecodeError as error:
        logger.warning("%s is damaged (%s): this start gets another W&B run", path, error)
    alphabet = string.ascii_lowercase + string.digits
    run_id = "".join(secrets.choice(alphabet) for _ in range(8))
    write_text(path, run_id + "\n")
    return run_id, False


def _log_online_place(run: Any, is_restart: bool) -> None:
    """Tell the user where the W&B run is."""
    logger.info("W&B %s run %s at %s", "continues" if is_restart else "starts", run.id, run.url)
    if run.step:
        logger.info("W&B has this run's records before step %d; they are not sent again", run.step)


def _log_offline_place(run: Any, failure: Exception | None) -> None:
    """Tell the user where the records of an offline run are, and how to send them to W&B later.

    Args:
        failure: the reason why a run that should be online is not.
    """
    # Every start writes a folder of its own. --id makes one run of all of them, in the order of their dates.
    command = f"wandb sync --id {run.id} {Path(run.settings.sync_dir).parent / f'offline-run-*-{run.id}*'}"
    if failure is None:
        logger.info("W&B is offline: run %s is written to %s", run.id, run.settings.sync_dir)
        logger.info("send it with: %s", command)
        return
    reason = f"{type(failure).__name__}: {reason_of(failure)}"
    logger.warning(
        "W&B is offline, because its servers do not answer or refuse (%s). Run %s is written to %s; send it with: %s",
        reason,
        run.id,
        run.settings.sync_dir,
        command,
    )


def _is_outside_our_code(error: Exception) -> bool:
    """Return whether wandb, the file system or the network failed. wandb documents few of its exceptions, and moves them between releases,
    so that this function asks for the package that an exception is defined in. wandb's settings are a model of pydantic, which raises an
    exception of its own for an unusable environment variable; w1train does not use pydantic."""
    return isinstance(error, ImportError | OSError) or type(error).__module__.partition(".")[0] in ("wandb", "pydantic_core")


def reason_of(error: Exception) -> str:
    """Return the error's text in one line. The text of pydantic also has the value that it refuses, which may have a password in it."""
    if type(error).__module__.partition(".")[0] == "pydantic_core":
        mistakes: list[dict[str, Any]] = cast(Any, error).errors(include_url=False, include_context=False, include_input=False)
        places = [(".".join(map(str, mistake["loc"])), mistake["msg"]) for mistake in mistakes]
        return "; ".join(f"the setting {name} of W&B, or its environment variable: {message}" for name, message in places)
    return " ".join(str(error).split())
