"""One step under the profiler, its kernels put in groups (w1train/profiling/kernel_times.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from w1train.profiling import kernel_times
from w1train.profiling.kernel_times import GROUPS, Breakdown, group_by_name, in_group
from w1train.runtime.ranges import kernel_group

__all__ = ["GROUPS", "NUM_LARGEST", "Breakdown", "break_down", "group_by_name", "profile_step"]

NUM_LARGEST = 15
"""Kernels that a report lists."""


def profile_step(step: Callable[[], Any], device: torch.device) -> Breakdown:
    """Profile one step, with ranges around its groups of kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with kernel_group.listening(in_group), torch.profiler.profile(activities=activities) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return break_down(list(profiler.events() or []), on_gpu=device.type == "cuda")


def break_down(events: list[Any], *, on_gpu: bool) -> Breakdown:
    """Return the times of the profiler's events by group, with the NUM_LARGEST slowest kernels."""
    return kernel_times.break_down(events, on_gpu=on_gpu, num_largest=NUM_LARGEST)
