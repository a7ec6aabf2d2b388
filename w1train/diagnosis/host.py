"""Findings about the host: cores, memory, limits, shared memory, disk."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
import time
from pathlib import Path

import psutil
import torch

from w1train.diagnosis.findings import Finding, Section

_MIN_OPEN_FILES = 4096
_MIN_SHARED_GIB = 1.0
_DISK_BYTES = 64 * 2**20
_MIN_DISK_MB_PER_SECOND = 100.0
_SHARED_MEMORY = Path("/dev/shm")


def host_section(runs_dir: Path, *, quick: bool) -> Section:
    """Return the findings about the host.

    Args:
        quick: leave out the check of the disk, which takes time and writes.
    """
    memory = psutil.virtual_memory()
    findings = [
        Finding("host", socket.gethostname(), detail=" ".join(os.uname()[:3:2])),
        Finding("cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}", detail=f"{torch.get_num_threads()} threads of torch"),
        Finding("memory", f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free"),
        _open_files(),
        _locked_memory(),
        _shared_memory(_SHARED_MEMORY),
    ]
    return Section("host", findings if quick else [*findings, disk_finding(runs_dir)])


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < _MIN_OPEN_FILES
    detail = f"many ranks, token files and workers need more: ulimit -n {min(hard, 65536)}" if few else ""
    return Finding("open files", _limit(soft), "warning" if few else "ok", detail)


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("locked memory", "unlimited")
    return Finding("locked memory", f"{soft / 2**20:.0f} MiB", "note", "InfiniBand needs it unlimited (docker run --ulimit memlock=-1)")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _shared_memory(path: Path) -> Finding:
    if not path.is_dir():
        return Finding(str(path), "absent", "warning", "loader workers and NCCL pass data through it")
    gib = shutil.disk_usage(path).free / 2**30
    few = gib < _MIN_SHARED_GIB
    return Finding(str(path), f"{gib:.1f} GiB free", "warning" if few else "ok", "docker run --ipc=host or --shm-size=16g" if few else "")


def disk_finding(runs_dir: Path) -> Finding:
    """Measure the writing of a file, through the cache to the disk, in the directory of runs or the nearest parent that exists."""
    folder = runs_dir.absolute()
    while not folder.is_dir():
        folder = folder.parent
    content = os.urandom(_DISK_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            began = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
    except OSError as error:
        return Finding("runs_dir", str(folder), "failed", f"cannot be written to: {error}")
    speed, free = _DISK_BYTES / seconds / 1e6, shutil.disk_usage(folder).free / 2**30
    detail = f"one file of {_DISK_BYTES >> 20} MiB in {folder}, {free:,.0f} GiB free"
    return Finding("runs_dir", f"{speed:,.0f} MB/s", "warning" if speed < _MIN_DISK_MB_PER_SECOND else "ok", detail)
