"""The run directory, which holds everything that a run writes. Only one process group may use it at a time."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path
from typing import BinaryIO

from w1train.config.errors import UserError
from w1train.config.reading import LARGEST_STATUS, parse_json, shorten
from w1train.runtime.files import UnsafeFileError, open_in_place
from w1train.runtime.locks import lock_file

logger = logging.getLogger(__name__)


class RunDirectoryError(UserError):
    """An error about a run directory that cannot be used. The message says why, and what to do."""


class RunDirectoryInUseError(RunDirectoryError):
    """An error about a run directory that another process holds. It is no mistake: the process may have died with its node, before the file
    system frees the lock, and the same command succeeds later."""


class RunDirectory:
    """``runs_dir/name``: config.yaml, tokenizer.json and its manifest, chat_template.json, checkpoints/, metrics.jsonl, samples.jsonl,
    events.jsonl, run.log, summary.json, report.html, wandb/, tensorboard/, profile/, status.json, heartbeats/; after failures stacks/ and
    bad_batches/; and packings/ of datasets that cannot be written to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.tokenizer = path / "tokenizer.json"
        self.chat_template = path / "chat_template.json"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.events = path / "events.jsonl"
        self.log = path / "run.log"
        self.profile = path / "profile"
        self.summary = path / "summary.json"
        self.bad_batches = path / "bad_batches"
        self.packings = path / "packings"
        self._lock: BinaryIO | None = None

    def claim(self) -> None:
        """Create the directory and lock it until this process ends (the kernel frees the lock of a killed process). Where the file system
        has no locks, warn that nothing stops a second process.

        Raises:
            RunDirectoryInUseError: another process holds the directory.
            RunDirectoryError: the directory cannot be created, or its lock is a link to another file.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = open_in_place(self.path / ".lock", "a+b")
        except UnsafeFileError as error:
            raise RunDirectoryError(f"cannot lock run directory {self.path}: {error}") from error
        except OSError as error:
            raise RunDirectoryError(f"cannot use run directory {self.path}: {error}; set runs_dir to a writable place") from error
        try:
            refusal = lock_file(lock, wait=False)
        except BlockingIOError:
            raise RunDirectoryInUseError(
                f"run directory {self.path} is in use by {_holder(lock)}; wait for it, stop it, or choose another name=..."
            ) from None
        except OSError as error:
            raise RunDirectoryError(f"cannot lock run directory {self.path}: {error}; set runs_dir to another place") from error
        if refusal is not None:
            logger.warning(
                "run directory %s is not locked (%s): its file system has no locks, and two processes that train in it would damage it. "
                "The last process that began was %s. Make sure that it has ended, or mount the file system with locks (Lustre: flock)",
                self.path,
                refusal.strerror,
                _holder(lock),
            )
        lock.truncate(0)
        lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        lock.flush()
        self._lock = lock
        # A forked data worker has a copy of the open file. Without this it would keep the lock of a killed run until the worker ends too.
        os.register_at_fork(after_in_child=self.release)

    def release(self) -> None:
        """Release the directory's lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _holder(lock: BinaryIO) -> str:
    lock.seek(0)
    try:
        holder = parse_json(lock.read(LARGEST_STATUS))
        return f"process {shorten(holder['pid'])} on {shorten(holder['host'])[1:-1]}"
    except (ValueError, KeyError, TypeError):
        return "another process"
