"""What all ranks must decide alike between two steps, from what each of them knows alone: a signal may reach one rank, a disk be full
on another. One small all-reduce a step, over gloo."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(slots=True, frozen=True)
class StepFlags:
    """What one rank says; from :func:`agree`, what holds for all of them."""

    stop_requested: bool = False
    """A signal asks for the end: of any rank."""
    save_failed: bool = False
    """The background part of a save met an error: of any rank."""
    saved: bool = True
    """Nothing of a save is under way: of all ranks."""


class Agreement:
    """An exchange of flags that is under way: it travels while the rank does other work."""

    def __init__(self, flags: StepFlags) -> None:
        """Called on every rank at the same place. Raises RuntimeError where the connection to another rank is lost."""
        self._votes = torch.tensor([flags.stop_requested, flags.save_failed, not flags.saved], dtype=torch.int32)
        # A CPU tensor goes over gloo: reading the answer then waits for no kernel.
        self._work = dist.all_reduce(self._votes, op=dist.ReduceOp.MAX, async_op=True)

    def wait(self) -> StepFlags:
        """The flags of all ranks together, the same on every rank. Raises RuntimeError as the exchange itself."""
        self._work.wait()
        stop_requested, save_failed, unsaved = map(bool, self._votes.tolist())
        return StepFlags(stop_requested=stop_requested, save_failed=save_failed, saved=not unsaved)


def agree(flags: StepFlags) -> StepFlags:
    """The flags of all ranks together: called by every rank at the same place."""
    return Agreement(flags).wait()
