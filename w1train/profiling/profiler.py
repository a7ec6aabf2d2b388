"""Profiles of chosen steps: traces, memory snapshots and a table of time by part, or ranges for nsys.

The code marks its own ranges of time (w1train/runtime/ranges.py), and a profile listens to them while it runs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity

from w1train.config.schema_operation import ProfilingConfig
from w1train.profiling.kernel_times import Breakdown, break_down, in_group
from w1train.profiling.step_parts import PARTS, Part, PartClock, parts_table
from w1train.profiling.throughput import StepTimer
from w1train.runtime.device import device_name
from w1train.runtime.distributed import Ranks
from w1train.runtime.files import replace_by_library, write_text
from w1train.runtime.ranges import kernel_group, step_part

logger = logging.getLogger(__name__)

_NUM_LARGEST = 15
_MAX_MEMORY_EVENTS = 1_000_000


class Profiler:
    """A context manager around the training loop, which calls ``step_begins``. What follows a step (a save) is counted as part of it."""

    def __init__(self, config: ProfilingConfig, ranks: Ranks, directory: Path) -> None:
        """Choose what this rank records. Its files are written to ``directory``."""
        self.config, self.ranks, self.directory = config, ranks, directory
        is_here = self._is_here()
        self._steps = set(config.steps) if is_here and config.tool == "torch" else set()
        self._marks = is_here and config.tool == "nsys" and self._has_gpu()
        self._marked = contextlib.ExitStack()
        self._records = False
        self._running: _Profile | None = None

    def _is_here(self) -> bool:
        """Return whether this rank is to be profiled."""
        unknown = [rank for rank in self.config.ranks if rank >= self.ranks.world_size]
        if unknown and self.config.steps and self.ranks.is_main:
            logger.warning("profiling.ranks: there is no rank %s among %d", ", ".join(map(str, unknown)), self.ranks.world_size)
        return self.ranks.rank in self.config.ranks

    def _has_gpu(self) -> bool:
        if self.ranks.device.type != "cuda":
            logger.warning("profiling.tool=nsys does nothing here: NVTX ranges need a GPU. profiling.tool=torch profiles the CPU too")
        return self.ranks.device.type == "cuda"

    def __enter__(self) -> Profiler:
        if self._marks:
            self._marked.enter_context(step_part.listening(torch.cuda.nvtx.range))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Write the profile of the last step, unless an error cut the step short."""
        if self._running is not None:
            self._running.end(write=error is None)
        self._marked.close()
        if self._steps and error is None:
            logger.warning("profiling.steps: this start did not reach %s", ", ".join(map(str, sorted(self._steps))))

    def step_begins(self, step: int, timer: StepTimer) -> None:
        """End the profile of the step before ``step``, and begin a profile of ``step`` if it is asked for. Writing a profile is not counted
        as time of a step."""
        if self._marks:
            self._bound_for_nsys(step)
        if self._running is not None:
            self._running.end(write=True)
            self._running = None
            timer.restart()
        if step in self._steps:
            self._steps.remove(step)
            self._running = _Profile(self, step)
            timer.restart()

    def _bound_for_nsys(self, step: int) -> None:
        """Mark the profiled steps as the steps that nsys records with --capture-range=cudaProfilerApi."""
        steps = self.config.steps
        if not self._records and steps and min(steps) <= step <= max(steps):
            self._records = True
            torch.cuda.synchronize(self.ranks.device)
            torch.cuda.cudart().cudaProfilerStart()
        if self._records and step > max(steps):
            self._records = False
            torch.cuda.synchronize(self.ranks.device)
            torch.cuda.cudart().cudaProfilerStop()


class _Profile:
    """Torch's profiler around one step."""

    def __init__(self, owner: Profiler, step: int) -> None:
        self.step, self.rank, self.device = step, owner.ranks.rank, owner.ranks.device
        self.path = owner.directory / f"step_{step}_rank_{self.rank}"
        self.on_gpu = self.device.type == "cuda"
        self.records_memory = owner.config.memory and self.on_gpu
        if owner.config.memory and not self.on_gpu:
            logger.info("profile of step %d: no memory snapshot, which only CUDA's allocator has", step)
        if self.records_memory:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_MEMORY_EVENTS)
        self.stack = contextlib.ExitStack()
        self.clock = PartClock(self.device, record_function)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self.profiler = self.stack.enter_context(torch.profiler.profile(activities=activities))
        self.stack.enter_context(kernel_group.listening(in_group))
        self.stack.enter_context(step_part.listening(self.clock.part))
        self.clock.start()

    def end(self, *, write: bool) -> None:
        """Stop recording, and write trace, snapshot and table."""
        # After an error the GPU may never finish its work, and is not waited for.
        parts = self.clock.stop() if write else {}
        if self.records_memory and write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replace_by_library(f"{self.path}_memory.pickle") as path:
                torch.cuda.memory._dump_snapshot(str(path))
        if self.records_memory:
            torch.cuda.memory._record_memory_history(enabled=None)
        self.stack.close()
        if not write:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replace_by_library(f"{self.path}.json.gz") as path:
            self.profiler.export_chrome_trace(str(path))
        breakdown = break_down(list(self.profiler.events() or []), on_gpu=self.on_gpu, num_largest=_NUM_LARGEST)
        table = "\n".join(self._table(parts, breakdown))
        write_text(Path(f"{self.path}.txt"), table + "\n")
        logger.info("%s.json.gz written: open it at https://ui.perfetto.dev\n%s", self.path, table)

    def _table(self, parts: dict[str, Part], breakdown: Breakdown) -> Iterator[str]:
        yield f"step {self.step} of rank {self.rank} on {device_name(self.device)}, under the profiler, which slows it down"
        yield ""
        yield from parts_table(parts, PARTS)
        yield ""
        total = sum(breakdown.seconds.values()) or 1.0
        yield f"{'kernels' if self.on_gpu else 'operators':<20} {'seconds':>9} {'share':>7}"
        for group, seconds in sorted(breakdown.seconds.items(), key=lambda item: -item[1]):
            yield f"{group:<20} {seconds:>9.4f} {seconds / total:>7.1%}"
        yield ""
        yield f"the {len(breakdown.largest)} that take most"
        for group, name, seconds in breakdown.largest:
            yield f"{seconds:>9.4f}  {group:<20} {name[:90]}"
