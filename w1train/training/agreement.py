"""The agreement of all ranks between two steps about a signal that asks for the end, because a signal may reach only one rank. The exchange
is a small all-reduce over gloo in each step."""

from __future__ import annotations

import torch
import torch.distributed as dist


class Agreement:
    """An exchange that is under way while the rank does other work."""

    def __init__(self, stop_signal: int) -> None:
        """Send the number of the signal that asks this rank for the end, or 0. Every rank calls this at the same place.

        Raises:
            RuntimeError: the connection to another rank is lost.
        """
        self._votes = torch.tensor([stop_signal], dtype=torch.int32)
        # A CPU tensor is sent over gloo, so that a rank that reads the answer does not wait for a kernel.
        self._work = dist.all_reduce(self._votes, op=dist.ReduceOp.MAX, async_op=True)

    def wait(self) -> int:
        """Return the number of the signal that asks any rank for the end, or 0, the same on every rank. If ranks have got different
        signals, it is the highest number: the ranks end as a scheduler's SIGTERM or SIGUSR1 asks, and not as Ctrl-C does.

        Raises:
            RuntimeError: the connection to another rank is lost.
        """
        self._work.wait()
        return int(self._votes.item())
