"""A measurement of the rank that the other ranks wait for. At some steps all ranks wait for each other before gradients are added, and
compare how long each waited.

The slowest rank waits least. Only ranks of the same pipeline stage are compared, because stages end their backward passes one after the
other. With parallel.overlap_grad_reduce ranks have already waited for each other in the backward pass, and the differences are smaller.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from w1train.engine.gradient_hooks import GradientHooks

logger = logging.getLogger(__name__)

_RANK_BITS = 20
_NOTHING = (1 << 62) - 1
_TIMES_BEFORE_WARNING = 3


class StragglerClock:
    """A measurement around megatron-core's finalize_model_grads, at every ``interval``-th step."""

    def __init__(self, hooks: GradientHooks, interval: int, warning_share: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
            hooks: the hooks of the model, to which the measurement is added.
            interval: steps between two measurements; 0 = never.
            warning_share: the share of a step's time that ranks may wait for each other without a warning.
        """
        self._interval, self._warning_share, self._clock = interval, warning_share, clock
        self._is_due = False
        self._times_in_a_row = 0
        self.metrics: dict[str, float] = {}
        """Metrics of the current step. The dictionary is empty if this step is not measured."""
        if interval:
            hooks.register("stragglers", self._measured)

    def begin(self, step: int) -> None:
        """Begin the step of this number, counted from 1."""
        self.metrics = {}
        self._is_due = self._interval > 0 and step % self._interval == 0
        self._start = self._clock()

    def _measured(self, finalize: Callable[..., None], _config: Any) -> Callable[..., None]:
        def measured(*arguments: Any, **keywords: Any) -> None:
            if not self._is_due:
                finalize(*arguments, **keywords)
                return
            self._is_due = False
            slowest, spread, together = self._meet()
            finalize(*arguments, **keywords)
            self._warn(slowest, spread, together - self._start)

        return measured

    def _meet(self) -> tuple[int, float, float]:
        """Wait for all ranks. Return the slowest rank, how long other ranks waited for it, and the time on the clock."""
        # Kernels that still run belong to this rank's work.
        torch.cuda.synchronize()
        arrived = self._clock()
        dist.all_reduce(torch.zeros(1))  # a barrier on the CPU, which does not wait for a GPU
        together = self._clock()
        slowest, spread = _compare(together - arrived)
        self.metrics = {"health/slowest_rank": slowest, "health/rank_spread": spread}
        return slowest, spread, together

    def _warn(self, slowest: int, spread: float, seconds: float) -> None:
        """Warn on the rank that is slow, which knows its machine, if it was the slowest in several measurements in a row. A single
        measurement may be chance."""
        is_slow = slowest == dist.get_rank() and spread > self._warning_share * seconds
        self._times_in_a_row = self._times_in_a_row + 1 if is_slow else 0
        if self._times_in_a_row >= _TIMES_BEFORE_WARNING:
            logger.warning(
                "rank %d on %s is the slowest: others of its stage wait %.3f s for it in %.3f s of a step (health.straggler_share)",
                *(slowest, socket.gethostname(), spread, seconds),
            )


def _compare(waited: float) -> tuple[int, float]:
    """Return the rank that waited least, and how many seconds longer another rank of its pipeline stage waited, for the stage in which that
    difference is largest. All ranks get the same answer."""
    microseconds = min(round(waited * 1e6), 1 << 40)
    stage, num_stages = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_world_size()
    least = torch.full((2, num_stages), _NOTHING, dtype=torch.int64)
    # The first minimum gives the shortest wait with its rank, the second (of negative numbers) the longest wait.
    least[0, stage] = (microseconds << _RANK_BITS) | dist.get_rank()
    least[1, stage] = -microseconds
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    spreads = -least[1] - (least[0] >> _RANK_BITS)
    worst = int(spreads.argmax())
    return int(least[0, worst]) & ((1 << _RANK_BITS) - 1), int(spreads[worst]) / 1e6
