"""``status.json`` and the heartbeats: files that tell users and scripts what a run is doing.

They can be read without torch. The files are small and replaced whole. A run does not wait for them, and a status that cannot be written is
a warning.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from w1train.config.constraints import LARGEST_INTEGER
from w1train.config.reading import LARGEST_STATUS, FileContentError, read_json_object
from w1train.runtime.files import open_new
from w1train.runtime.masking import mask

logger = logging.getLogger(__name__)

State = Literal["starting", "running", "saving", "validating", "finished", "paused", "stopped", "failed", "mistake"]
STATUS_FILE = "status.json"
HEARTBEATS = "heartbeats"
_SECONDS_BETWEEN_WRITES = 1.0


@dataclass(slots=True)
class Status:
    """The state of a run, as rank 0 knows it."""

    state: State
    step: int
    num_steps: int
    tokens: int
    total_tokens: int
    time: float
    """Unix seconds of the last sign of progress. A run that hangs does not write it."""
    pid: int
    host: str
    world_size: int
    message: str | None = None
    """The reason why the run stopped or failed, or another fact that a reader should know."""


@dataclass(slots=True)
class Heartbeat:
    """The state of one rank, which it writes itself."""

    rank: int
    host: str
    pid: int
    step: int
    activity: str
    """What the rank does: starting, training, saving, ..."""
    time: float
    """Unix seconds at which the heartbeat was written: the process was alive then."""
    progress: float
    """Unix seconds of the rank's last sign of progress: a process that is alive may hang."""
    place: str
    """The innermost Python function of the rank's main thread."""
    stalled: str = ""
    """The part of a checkpoint that the rank reads or writes, if no byte of it has moved for a while."""


class StatusFile:
    """The writer of a run's status. It writes on rank 0 alone."""

    def __init__(self, directory: Path, world_size: int, *, active: bool) -> None:
        """Read the old status. If the run has finished, the file stays as it is until training continues: a start that finds nothing to do
        changes nothing."""
        self.path, self._active = directory / STATUS_FILE, active
        self._status = Status("starting", 0, 0, 0, 0, 0.0, os.getpid(), socket.gethostname(), world_size)
        old = read_status(directory)
        self._held = old is not None and old.state == "finished"
        self._written = float("-inf")

    def update(self, state: State | None = None, **values: Any) -> None:
        """Change some fields. The file is written at once if the state or the message changes, and otherwise at most once a second."""
        status = self._status
        changed = (state or status.state, values.get("message", status.message)) != (status.state, status.message)
        status.state = state or status.state
        for name, value in values.items():
            setattr(status, name, mask(value) if isinstance(value, str) else value)
        status.time = time.time()
        self._held = self._held and status.state in ("starting", "finished", "paused", "stopped", "failed", "mistake")
        now = time.monotonic()
        if self._active and not self._held and (changed or now - self._written >= _SECONDS_BETWEEN_WRITES):
            self._written = now
            write_json(self.path, asdict(status))

    @property
    def is_held(self) -> bool:
        """Tell whether the run had finished before this start, and this start leaves the status file as it is. All ranks know this."""
        return self._held


def read_status(directory: Path) -> Status | None:
    """Return the status of a run, or None if there is no status that can be read."""
    values = _read_json(directory / STATUS_FILE)
    return None if values is None else _from_values(Status, values)


def heartbeat_path(directory: Path, rank: int) -> Path:
    """Return the path of a rank's file, whether or not the file exists."""
    return directory / HEARTBEATS / f"rank_{rank:05d}.json"


def write_heartbeat(directory: Path, heartbeat: Heartbeat) -> None:
    """Replace the rank's file."""
    write_json(heartbeat_path(directory, heartbeat.rank), asdict(heartbeat))


def read_heartbeats(directory: Path, world_size: int) -> dict[int, Heartbeat]:
    """Return the heartbeats of a run that can be read, by rank."""
    found = {}
    # The loop is over the files, and not over the world size, which somebody else's status.json may give as 10^18.
    for path in sorted((directory / HEARTBEATS).glob("rank_*.json")):
        values = _read_json(path)
        heartbeat = None if values is None else _from_values(Heartbeat, values)
        if heartbeat is not None and heartbeat.rank < world_size and path == heartbeat_path(directory, heartbeat.rank):
            found[heartbeat.rank] = heartbeat
    return dict(sorted(found.items()))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace a small file, and warn if it cannot be written: a full disk becomes an error when a checkpoint needs it. The file may reach
    the disk later, because after a power cut the run is over anyway."""
    # The watchdog's thread may write while the main thread hangs in the middle of the same file.
    partial = path.with_name(f".{path.name}.{threading.current_thread().name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_new(partial) as file:
            file.write(json.dumps(values).encode())
        os.replace(partial, path)
    except OSError as error:
        logger.warning("could not write %s: %s", path, error)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path, "status", LARGEST_STATUS)
    except (OSError, FileContentError):
        return None


def _from_values[Record](kind: type[Record], values: dict[str, Any]) -> Record | None:
    """Make the record, or return None where a field is missing, is unknown or has an impossible value."""
    try:
        record = kind(**values)
    except TypeError:
        return None
    types = _types(kind.__name__)
    return record if all(_is_possible(types[name], value) for name, value in values.items()) else None


@cache
def _types(name: str) -> dict[str, Any]:
    """Return the types of the fields of one of this module's classes. Kept, because a run of thousands of ranks has as many heartbeats."""
    return get_type_hints(globals()[name])


def _is_possible(kind: Any, value: object) -> bool:
    if kind in (int, float):
        return type(value) in (int, kind) and 0 <= value <= LARGEST_INTEGER  # type: ignore[operator]
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return isinstance(value, str) or (value is None and kind is not str)
