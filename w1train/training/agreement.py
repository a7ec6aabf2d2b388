"""What all ranks must decide alike between two steps, from what each of them knows alone: a signal may reach one rank only. The exchange
is one small all-reduce a step, over gloo."""

from __future__ import annotations

import torch
import torch.distributed as dist


class Agreement:
    """An exchange that is under way: it travels while the rank does other work."""

    def __init__(self, stop_requested: bool) -> None:
        """Send whether a signal asks this rank for the end. Called on every rank at the same place.

        Raises:
            RuntimeError: the connection to another rank is lost.
        """
        self._votes = torch.tensor([stop_requested], dtype=torch.int32)
        # A CPU tensor goes over gloo: reading the answer then waits for no kernel.
        self._work = dist.all_reduce(self._votes, op=dist.ReduceOp.MAX, async_op=True)

    def wait(self) -> bool:
        """Return whether a signal asks any rank for the end, the same on every rank.

        Raises:
            RuntimeError: the connection to another rank is lost.
        """
        self._work.wait()
        return bool(self._votes.item())
