"""The log of a run: on the console, and with dates in ``RUN/run.log``.

Lines on a terminal are for a person, and have no dates and names of modules. Lines for a file have both.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from w1train.runtime.files import UnsafeFileError, open_in_place
from w1train.runtime.masking import mask
from w1train.runtime.status import StatusFile

logger = logging.getLogger(__name__)

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# Beginnings of warnings that tell users nothing: those of megatron-core about its own shards of the parameters, those
# of torch about the way in which megatron-core reads a checkpoint's metadata, and deprecations of one library in the other.
_LIBRARY_CHATTER = (
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process",
    "The argument order of load has been changed",
)
_DETAILS = ("w1train.runtime.kernel_choices", "w1train.runtime.megatron_on_cpu", "w1train.training.schedule_position")
"""Loggers whose information the description of the run gives a person in fewer words."""


def set_up_logging() -> None:
    """Set up logging: rank 0 logs at INFO, the other ranks only warnings and errors."""
    handler = logging.StreamHandler()
    if sys.stderr.isatty():
        handler.setFormatter(_TerminalFormatter())
        handler.addFilter(lambda record: record.levelno > logging.INFO or record.name not in _DETAILS)
    else:
        handler.setFormatter(logging.Formatter(_FORMAT))
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, handlers=[handler])
    # At INFO, megatron-core logs its whole configuration and the name of every parameter.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    for message in _LIBRARY_CHATTER:
        warnings.filterwarnings("ignore", message=re.escape(message))


class _TerminalFormatter(logging.Formatter):
    """A formatter for a person: the level is shown from WARNING on, and the rank if the rank is not 0."""

    def format(self, record: logging.LogRecord) -> str:
        rank = os.environ.get("RANK", "0")
        place = "" if rank == "0" else f"rank {rank}: "
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"{place}{level}{super().format(record)}"


@contextmanager
def logged_to(path: Path, status: StatusFile, *, active: bool) -> Iterator[None]:
    """Append the log of this process to a file inside the block, if ``active``. A start that finds nothing to do in a finished run leaves
    the file as it is."""
    handler = _LogFile(path, status)
    if active:
        logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        handler.close()


class _LogFile(logging.Handler):
    """A handler that appends to a file. A run does not depend on the file: if it cannot be written, a warning says this once."""

    def __init__(self, path: Path, status: StatusFile) -> None:
        super().__init__()
        self._path, self._status = path, status
        self._waiting: list[str] = []
        self.setFormatter(logging.Formatter(_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, and before it the records that came while the status of a finished run was held."""
        self._waiting.append(f"{mask(self.format(record))}\n")
        if self._status.is_held:
            return
        lines, self._waiting = self._waiting, []
        try:
            with open_in_place(self._path, "ab") as file:
                file.write("".join(lines).encode("utf-8", "backslashreplace"))
        except (OSError, UnsafeFileError) as error:
            self.close()
            logger.warning("cannot write the log to %s (%s): training continues without this file", self._path, error)

    def close(self) -> None:
        """Take no more records."""
        logging.getLogger().removeHandler(self)
        super().close()
