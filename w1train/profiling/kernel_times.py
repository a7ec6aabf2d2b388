"""The time of the kernels of one training step, in groups by what they compute.

A kernel belongs to the group of the range that launched it, or of the range whose backward pass launched it. The group of a kernel that was
launched outside all ranges is guessed from its name. The ranges are those that the code marks with ``kernel_group``
(w1train/runtime/ranges.py). A backward kernel is traced to its range by autograd's sequence numbers, which torch gives to both passes.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler import record_function

GROUPS = ("attention", "GEMM", "norm and modulation", "rotary and SwiGLU", "loss and head", "optimizer", "communication", "other")
_PREFIX = "w1train: "
_BACKWARD_SCOPE = 1  # at::RecordScope::BACKWARD_FUNCTION
# (pattern, group); the first pattern that is found in a kernel's name counts. Names of CPU operators are here too, for runs without a GPU.
_BY_NAME: tuple[tuple[str, str], ...] = (
    (r"nccl|all_reduce|allreduce|reduce_scatter|allgather", "communication"),
    (r"flash|fmha|flex_att|flexatt|attention|sdpa", "attention"),
    (r"gemm|nvjet|cublas|cutlass|wgmma|splitk|aten::(mm|addmm|bmm|matmul|linear)", "GEMM"),
    (r"norm|gate|modulat", "norm and modulation"),
    (r"rotate|rotary|swiglu|silu", "rotary and SwiGLU"),
    (r"cross_entropy|softmax_terms|nll_loss", "loss and head"),
    (r"adam|multi_tensor|l2norm", "optimizer"),
)


@dataclass(slots=True, frozen=True)
class Breakdown:
    """Seconds of one step by group, and the seconds in which any kernel ran (which are fewer where streams overlap)."""

    seconds: dict[str, float]
    busy: float
    largest: list[tuple[str, str, float]]
    """(group, kernel, seconds) of the kernels that take most time."""


def in_group(group: str) -> contextlib.AbstractContextManager[Any]:
    """Open the range from which :func:`break_down` knows the group of a kernel."""
    return record_function(_PREFIX + group)


def break_down(events: list[Any], *, on_gpu: bool, num_largest: int) -> Breakdown:
    """Sum the profiler's events by group: the time of kernels on a GPU, operators' own time on the CPU."""
    ranges = _backward_ranges(events)
    seconds: defaultdict[str, float] = defaultdict(float)
    by_kernel: defaultdict[tuple[str, str], float] = defaultdict(float)
    for name, group, microseconds in _work(events, ranges, on_gpu):
        seconds[group] += microseconds / 1e6
        by_kernel[group, name] += microseconds / 1e6
    largest = sorted(((group, name, value) for (group, name), value in by_kernel.items()), key=lambda row: -row[2])[:num_largest]
    busy = _union(events) if on_gpu else sum(seconds.values())
    return Breakdown({group: seconds[group] for group in GROUPS}, busy, largest)


def _work(events: list[Any], ranges: dict[tuple[int, int], str], on_gpu: bool) -> Iterator[tuple[str, str, float]]:
    """Yield (name, group, microseconds) of each piece of work."""
    launched: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        group = _range_of(event, ranges)
        if not on_gpu and not event.name.startswith(_PREFIX) and not getattr(event, "is_user_annotation", False):
            yield event.name, group or group_by_name(event.name), event.self_cpu_time_total
        for kernel in event.kernels:
            launched[kernel.name] += kernel.duration
            yield kernel.name, group or group_by_name(kernel.name), kernel.duration
    # The rest are kernels whose operator is not known.
    on_device: defaultdict[str, float] = defaultdict(float)
    for event in _device_events(events):
        on_device[event.name] += event.time_range.elapsed_us()
    for name, microseconds in on_device.items():
        if microseconds > launched[name] + 1.0:
            yield name, group_by_name(name), microseconds - launched[name]


def _device_events(events: list[Any]) -> Iterator[Any]:
    """Yield kernels and copies. The profiler also shows each named range on the device; leave these entries out."""
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.name.startswith(_PREFIX) and not getattr(event, "is_user_annotation", False):
            yield event


def group_by_name(name: str) -> str:
    """Return the group of a kernel that was launched outside all ranges."""
    for pattern, group in _BY_NAME:
        if re.search(pattern, name, re.IGNORECASE):
            return group
    return "other"


def _backward_ranges(events: list[Any]) -> dict[tuple[int, int], str]:
    """Return (thread, sequence number) -> group of the operators inside ranges. Their backward pass shows the same two numbers."""
    found: dict[tuple[int, int], str | None] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.device_type == DeviceType.CPU and event.sequence_nr >= 0 and not _is_backward(event):
            # An operator without a backward pass shows the number of the next operator that has one. The number belongs
            # to the last operator that shows it.
            found[event.thread, event.sequence_nr] = _enclosing_range(event)
    return {key: group for key, group in found.items() if group is not None}


def _is_backward(event: Any) -> bool:
    """Tell whether an event belongs to autograd. Both events that autograd has for a node show the number of the node's operator."""
    return event.name.startswith("autograd::engine::evaluate_function") or event.scope == _BACKWARD_SCOPE


def _enclosing_range(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith(_PREFIX):
            return str(event.name[len(_PREFIX) :])
        event = event.cpu_parent
    return None


def _range_of(event: Any, ranges: dict[tuple[int, int], str]) -> str | None:
    """Return the group of the innermost range, or of the range whose backward pass this is. (Recomputation has ranges inside a backward
    pass.)"""
    while event is not None:
        if event.name.startswith(_PREFIX):
            return str(event.name[len(_PREFIX) :])
        if _is_backward(event) and (group := ranges.get((event.fwd_thread, event.sequence_nr))) is not None:
            return group
        event = event.cpu_parent
    return None


def _union(events: list[Any]) -> float:
    """Return the seconds in which at least one kernel ran."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted((event.time_range.start, event.time_range.end) for event in _device_events(events)):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e6
