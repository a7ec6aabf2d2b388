"""Stopwatches for the time that a step waits for data-parallel communication: the reduction of gradients and the gathering of parameters.

Collectives of tensor, pipeline and context parallelism are not measured: they belong to the forward and backward passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from w1train.engine.gradient_hooks import GradientHooks


class Stopwatch(Protocol):
    """A sum of the times between starts and stops."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def take(self) -> float:
        """Return the seconds that were added since the last call."""


class HostStopwatch:
    """A stopwatch that reads the host's clock. On the CPU a collective returns when it is done."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._sum = 0.0

    def start(self) -> None:
        self._started = self._clock()

    def stop(self) -> None:
        self._sum += self._clock() - self._started

    def take(self) -> float:
        seconds, self._sum = self._sum, 0.0
        return seconds


class CudaStopwatch:
    """A stopwatch that records events on the model's stream. A collective that the stream waits for adds to the time. A collective that
    runs beside the stream does not add to the time, so that overlapped communication counts only if it is not hidden.

    Events are read after they have happened and are never waited for, because the host would then no longer be ahead of the GPU.
    Communication at the end of a step (the gathering of parameters) is counted in the next step where the GPU has not reached it yet.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        self._started = torch.cuda.Event(enable_timing=True)
        self._started.record()

    def stop(self) -> None:
        stopped = torch.cuda.Event(enable_timing=True)
        stopped.record()
        self._pairs.append((self._started, stopped))

    def take(self) -> float:
        seconds, waiting = 0.0, []
        for started, stopped in self._pairs:
            if stopped.query():
                seconds += started.elapsed_time(stopped) / 1e3
            else:
                waiting.append((started, stopped))
        self._pairs = waiting
        return seconds


class CommunicationTimer:
    """A stopwatch around the functions of megatron-core in which a step waits for other data-parallel ranks.

    These functions are ``finalize_model_grads`` (the end of the reduction, and of the sums over tensor- and pipeline-parallel ranks for
    parameters that they share) and, bucket by bucket, the gathering of parameters: within the optimizer step, or, with
    parallel.overlap_param_gather, before the forward pass of the module that needs the parameters.
    """

    def __init__(self, hooks: GradientHooks, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._depth = 0
        hooks.register("communication", self._timed)

    def take(self) -> float:
        """Return the seconds of communication since the last call."""
        return self._stopwatch.take()

    def _timed(self, function: Callable[..., Any], _owner: Any) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            # The end of the gathering of one bucket starts the gathering of the next.
            if self._depth == 0:
                self._stopwatch.start()
            self._depth += 1
            try:
                return function(*arguments, **options)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._stopwatch.stop()

        return call


def communication_timer(hooks: GradientHooks, device: torch.device) -> CommunicationTimer:
    """Return the timer for a model on this device."""
    return CommunicationTimer(hooks, CudaStopwatch() if device.type == "cuda" else HostStopwatch())
