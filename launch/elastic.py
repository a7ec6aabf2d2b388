"""The command that is torchrun, with two differences: it does not start ranks again after a mistake of the user or after a signal that has
ended the run with a checkpoint, and it prints no traceback or warning of its own below the message of a rank.

    python -m launch.elastic --standalone --nproc-per-node 8 -m w1train.pretrain recipe=w1_4b

launch/torchrun.sh uses it. The arguments are those of torchrun.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.distributed.run as torchrun
from torch.distributed.elastic.agent.server import local_elastic_agent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

from w1train.runtime.command import command
from w1train.runtime.exit_status import ExitStatus

_FINAL = (ExitStatus.MISTAKE, ExitStatus.STOPPED, ExitStatus.INTERRUPTED)
"""The statuses of ranks that are not started again: a mistake would be made again, and a run that a signal has ended shall not continue."""

PASSED_ON = {
    "torch.distributed.elastic.agent.server.api": "Received %s death signal",
    "torch.distributed.elastic.multiprocessing.api": "Sending process %s closing signal",
}
"""torchrun's loggers, and the beginnings of their lines about a signal, of which there is one for each rank. The ranks themselves say what
follows from the signal."""


class Agent(local_elastic_agent.LocalElasticAgent):
    """torchrun's agent of a node. It does not use its remaining restarts after a final status."""

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if _final_status(result.failures) is not None:
            self._remaining_restarts = 0
        return result


def _final_status(failures: dict[int, Any]) -> ExitStatus | None:
    found = {failure.exitcode for failure in failures.values()}
    return next((status for status in _FINAL if status in found), None)


def _does_not_begin(beginning: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(beginning)


@command("launch.elastic")
def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit status: 0, 2, 75 or 130 if a rank has ended with this status, and 1 for every other failure and if a
    signal has ended torchrun itself. Exit with 2 for wrong options."""
    api.LocalElasticAgent = Agent
    for name, beginning in PASSED_ON.items():
        logging.getLogger(name).addFilter(partial(_does_not_begin, beginning))
    try:
        # Without the decorator of torchrun's main, which prints the table of the ranks' tracebacks.
        torchrun.run(torchrun.parse_args(list(arguments)))
    except ChildFailedError as error:
        return _final_status(error.failures) or ExitStatus.FAILED
    except SignalException:
        return ExitStatus.FAILED
    return ExitStatus.FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
