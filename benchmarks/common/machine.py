"""The device of a measurement: what it is, a clock for its work, and its memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import pairwise
from typing import Any

import torch

from benchmarks.common.report import Table, environment
from w1train.config.errors import UserError

GPU_PACKAGES = ("torch", "triton", "megatron-core", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "transformer-engine")
_SMI_FIELDS = {
    "driver_version": "driver",
    "clocks.sm": "SM clock at the end",
    "clocks.max.sm": "largest SM clock",
    "clocks.mem": "memory clock",
    "power.limit": "power limit",
    "temperature.gpu": "temperature at the end, C",
}
# More than the L2 of any GPU here (50 MB on an H100).
_FLUSHED_BYTES = 256 * 2**20


def open_device(name: str) -> torch.device:
    """The device that a command line names.

    Raises:
        UserError: it is a GPU, and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and torch finds no GPU; --device cpu --tiny is a dry run")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def versions() -> dict[str, str]:
    """Of what a GPU measurement depends on; "absent" for what is not installed."""
    found = {"CUDA": torch.version.cuda or "absent", "cuDNN": str(torch.backends.cudnn.version() or "absent")}
    for name in GPU_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def describe(device: torch.device) -> dict[str, str]:
    """Name of the device, and for a GPU what nvidia-smi says of its driver, clocks and power."""
    if device.type != "cuda":
        return {"device": device.type}
    properties = torch.cuda.get_device_properties(device)
    described = {"device": properties.name, "memory": f"{properties.total_memory / 2**30:.1f} GiB"}
    return {**described, "multiprocessors": str(properties.multi_processor_count), **_nvidia_smi()}


def _nvidia_smi() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"gave no answer ({error})"}
    return dict(zip(_SMI_FIELDS.values(), (value.strip() for value in answer.strip().split(",")), strict=True))


def gpu_environment(command: str, machine: dict[str, str], software: dict[str, str]) -> Table:
    """Machine, versions and command, the GPU's included."""
    table = environment(command)
    known = {name for name, _ in table.rows}
    rows = [*machine.items(), *((name, version) for name, version in software.items() if name not in known)]
    return Table(table.title, table.columns, [*table.rows, *rows])


class Clock:
    """Times work on a device: between events on a GPU, by the wall on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def seconds(self, parts: Sequence[Callable[[], Any]]) -> list[float]:
        """Of each part, one after another; the first one finds the L2 cache without its inputs, as in a layer of many."""
        if self._flushed is None:
            return [_wall_seconds(part) for part in parts]
        # It also keeps the GPU busy while the first kernels are being launched.
        self._flushed.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        events[0].record()
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record()
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]

    def wall_seconds(self, work: Callable[[], Any]) -> float:
        """Until the device has done it, launches and waiting of the host included."""
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        """Wait for all work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _wall_seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def allocated_bytes(device: torch.device) -> int | None:
    """What tensors hold now; None on the CPU, where nobody counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int | None:
    """What tensors held at most during the work, beyond what they held before; None on the CPU."""
    before = allocated_bytes(device)
    if before is None:
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
