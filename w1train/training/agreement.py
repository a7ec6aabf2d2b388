"""The agreement of all ranks to stop at the same step. A signal may reach one rank alone, and a rank that stopped without the others would
leave them waiting. It takes one small all-reduce a step, over gloo."""

from __future__ import annotations

import torch
import torch.distributed as dist


class StopAgreement:
    """An exchange that is under way. It travels while the rank does other work."""

    def __init__(self, stop_requested: bool) -> None:
        """Begin the exchange. Called on every rank at the same place. Raise RuntimeError where the connection to another rank is lost.

        Args:
            stop_requested: whether a signal has asked this rank to stop.
        """
        self._vote = torch.tensor([stop_requested], dtype=torch.int32)
        # A tensor on the CPU travels over gloo: reading the answer then waits for no kernel.
        self._work = dist.all_reduce(self._vote, op=dist.ReduceOp.MAX, async_op=True)

    def wait(self) -> bool:
        """Return whether a signal has asked any rank to stop: the same on every rank. Raise RuntimeError as the exchange itself."""
        self._work.wait()
        return bool(self._vote.item())
