"""The device of a measurement: its description, a clock for its work, and its memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import pairwise
from typing import Any

import torch

from benchmarks.common.results_page import Table, environment
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
# More bytes than the L2 cache of any GPU that is measured (50 MB on an H100).
_FLUSHED_BYTES = 256 * 2**20


def open_device(name: str) -> torch.device:
    """Return the device that a command line names.

    Raises:
        UserError: the device is a GPU, and torch finds no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and torch finds no GPU; --device cpu --tiny is a dry run")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def versions() -> dict[str, str]:
    """Return the versions of what a measurement on a GPU depends on, with "absent" for packages that are not installed."""
    found = {"CUDA": torch.version.cuda or "absent", "cuDNN": str(torch.backends.cudnn.version() or "absent")}
    for name in GPU_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def describe(device: torch.device) -> dict[str, str]:
    """Return the name of the device, and for a GPU the driver, clocks and power that nvidia-smi reports."""
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
    """Return the table of machine, versions and command, with those of the GPU."""
    table = environment(command)
    known = {name for name, _ in table.rows}
    rows = [*machine.items(), *((name, version) for name, version in software.items() if name not in known)]
    return Table(table.title, table.columns, [*table.rows, *rows])


class Clock:
    """A clock for work on a device: by events on a GPU, and by wall time on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def seconds(self, parts: Sequence[Callable[[], Any]]) -> list[float]:
        """Return the seconds of each part, which run one after another. The first part does not find its inputs in the L2 cache, as in a
        model of many layers."""
        if self._flushed is None:
            return [_wall_seconds(part) for part in parts]
        # This also keeps the GPU busy while the first kernels are being launched.
        self._flushed.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        events[0].record()
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record()
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]

    def wall_seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds until the device has done the work, with the launches and waiting of the host."""
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _wall_seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def allocated_bytes(device: torch.device) -> int | None:
    """Return the bytes that tensors hold now, or None on the CPU, where they are not counted."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int | None:
    """Return the most bytes that tensors held during the work, without those that they held before, or None on the CPU."""
    before = allocated_bytes(device)
    if before is None:
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
