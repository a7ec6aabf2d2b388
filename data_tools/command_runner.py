"""The end of a command: its exit status, and the message about a mistake of the user or a fault of the machine."""

from __future__ import annotations

import logging
from collections.abc import Callable

from data_tools.progress import setup_logging
from data_tools.workers import WorkerError
from w1train.config.errors import UserError
from w1train.data.text.file_names import CorpusError
from w1train.runtime.command import describe_error

logger = logging.getLogger(__name__)


def run_command(command: Callable[[], None]) -> int:
    """Run a command, and return its exit status: 0; 1 after a mistake of the user or a fault of the machine (a full disk, say), which the
    log then describes; 130 after Ctrl-C."""
    setup_logging()
    try:
        command()
    except (CorpusError, UserError, WorkerError, OSError) as error:
        logger.error("%s", describe_error(error))
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 130
    return 0
