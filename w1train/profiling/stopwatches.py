"""How long a step waits for data-parallel communication: the reduction of gradients and the gathering of parameters.

Only these. Collectives of tensor, pipeline and context parallelism lie inside the forward and backward passes, and are part of those.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from w1train.engine.gradient_hooks import GradientHooks


class Stopwatch(Protocol):
    """Sums the time between its starts and stops."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def take(self) -> float:
        """Seconds since the last call."""


class HostStopwatch:
    """By the wall clock: on the CPU a collective returns when it is done."""

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
    """By events on the model's stream. A collective that is waited for holds that stream up; one that runs beside it does not, so that
    overlapped communication counts only where it is not hidden.

    Events are read when they have happened, never waited for, which would take the host's lead over the GPU away. What ends a step (the
    gathering of parameters) is therefore counted in the step after it where the GPU has not come to it yet.
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
    """Puts a stopwatch around megatron-core's functions that a step waits in for other data-parallel ranks.

    These are ``finalize_model_grads`` (the end of the reduction, and of the sums over tensor- and pipeline-parallel ranks for
    parameters they share) and, bucket by bucket, the gathering of parameters: within the optimizer step, or, with
    parallel.overlap_param_gather, before the forward pass of the module that needs them.
    """

    def __init__(self, hooks: GradientHooks, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._depth = 0
        hooks.register("communication", self._timed)

    def take(self) -> float:
        """Seconds since the last call."""
        return self._stopwatch.take()

    def _timed(self, function: Callable[..., Any], _owner: Any) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            # The end of one gathering starts the next one.
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
