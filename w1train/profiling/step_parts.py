"""The time of the parts of a step: data, forward, backward, reduce, optimizer, and what comes between two steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import get_args

import torch

from w1train.profiling.stopwatches import CudaStopwatch, HostStopwatch
from w1train.runtime.ranges import OpenRange, StepPart

PARTS: tuple[StepPart, ...] = get_args(StepPart)
"""The parts in the order of the table."""


@dataclass(slots=True)
class Part:
    """The number of calls of one part within one step, and their time."""

    calls: int
    host_seconds: float
    device_seconds: float | None
    """Seconds on the model's stream. None on the CPU, where the host does the work."""


@dataclass(slots=True)
class PartClock:
    """A listener to the parts of a step. A part inside another part (the forward passes of a validation) is counted as the outer part."""

    device: torch.device
    open_range: OpenRange
    """A function that opens a range in the trace around each part that is counted."""
    _calls: dict[str, int] = field(default_factory=dict)
    _host: dict[str, HostStopwatch] = field(default_factory=dict)
    _gpu: dict[str, CudaStopwatch] = field(default_factory=dict)
    _is_inside: bool = False

    def start(self) -> None:
        """Begin a step, and forget the step before it."""
        self._calls.clear()
        self._host.clear()
        self._gpu.clear()
        self._begin("step")

    def stop(self) -> dict[str, Part]:
        """End the step, and return its parts by name, and "step" itself."""
        self._end("step")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {
            name: Part(calls, self._host[name].take(), self._gpu[name].take() if name in self._gpu else None)
            for name, calls in self._calls.items()
        }

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the block as time of this part."""
        if self._is_inside:
            yield
            return
        self._is_inside = True
        self._begin(name)
        try:
            with self.open_range(name):
                yield
        finally:
            self._end(name)
            self._is_inside = False

    def _begin(self, part: str) -> None:
        self._calls[part] = self._calls.get(part, 0) + 1
        self._host.setdefault(part, HostStopwatch(time.perf_counter)).start()
        if self.device.type == "cuda":
            self._gpu.setdefault(part, CudaStopwatch()).start()

    def _end(self, part: str) -> None:
        self._host[part].stop()
        if self.device.type == "cuda":
            self._gpu[part].stop()


def parts_table(parts: dict[str, Part], order: Iterable[str]) -> list[str]:
    """Return the lines of a table: the parts that occurred, in the given order, the rest of the step, and the step."""
    step = parts["step"]
    inside = [(name, parts[name]) for name in order if name in parts]
    left = Part(
        0,
        step.host_seconds - sum(part.host_seconds for _, part in inside),
        None if step.device_seconds is None else step.device_seconds - sum(part.device_seconds or 0.0 for _, part in inside),
    )
    on_gpu = step.device_seconds is not None
    heading = f"{'part':<10} {'calls':>5} {'host s':>9}" + (f" {'device s':>9}" if on_gpu else "") + f" {'share':>7}"
    rows = [_row(name, part, step) for name, part in [*inside, ("other", left), ("step", step)]]
    return [heading, *rows]


def _row(name: str, part: Part, step: Part) -> str:
    calls = f"{part.calls}" if part.calls and name != "step" else ""
    device = "" if part.device_seconds is None else f" {part.device_seconds:>9.4f}"
    spent, total = (part.host_seconds, step.host_seconds) if step.device_seconds is None else (part.device_seconds, step.device_seconds)
    return f"{name:<10} {calls:>5} {part.host_seconds:>9.4f}{device} {(spent or 0.0) / total:>7.1%}"
