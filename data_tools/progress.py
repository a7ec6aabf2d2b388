"""The progress of a command: a bar with the rate and the time left on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

logger = logging.getLogger(__name__)

console = Console(stderr=True)
_LOG_SECONDS = 10.0


def setup_logging() -> None:
    """Log to standard error, above the progress bar if there is one."""
    if console.is_terminal:
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


class ByteProgress:
    """A display of the bytes that are done out of a total, while the ``with`` statement lasts."""

    def __init__(self, description: str, num_bytes: int) -> None:
        self._description = description
        self._num_bytes = num_bytes
        self._began = self._logged = time.monotonic()
        self._num_decoded = 0
        decoded = TextColumn("{task.fields[decoded]}")
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), decoded, TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(description, total=num_bytes, decoded="")

    def update(self, num_bytes_done: int, num_bytes_decoded: int = 0) -> None:
        """Show that ``num_bytes_done`` bytes of the files are done, and that ``num_bytes_decoded`` more bytes have been decoded."""
        self._num_decoded += num_bytes_decoded
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        decoded = ""
        if self._num_decoded > num_bytes_done:  # files are compressed, or input was skipped
            decoded = f"decoded {self._num_decoded / 1e6:.1f} MB, {self._num_decoded / seconds / 1e6:.2f} MB/s"
        self._bar.update(self._task, completed=num_bytes_done, decoded=decoded)
        if console.is_terminal or now - self._logged < _LOG_SECONDS:
            return
        self._logged = now
        rate = num_bytes_done / seconds
        left = (self._num_bytes - num_bytes_done) / rate if rate else float("inf")
        done, total = num_bytes_done / 1e6, self._num_bytes / 1e6
        message = f"{done:.1f} of {total:.1f} MB, {rate / 1e6:.2f} MB/s, {left:.0f} s left"
        logger.info("%s: %s", self._description, f"{message}; {decoded}" if decoded else message)

    def __enter__(self) -> ByteProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.stop()
