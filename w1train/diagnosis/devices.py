"""Findings about GPUs: their kinds, clocks and links, and the speed of copies. On a CPU: the speed of copies and products."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator

import torch

from w1train.diagnosis.findings import Finding, Section

_SMI_FIELDS = (
    "index", "name", "driver_version", "memory.total", "power.limit", "temperature.gpu",
    "clocks.sm", "clocks.max.sm", "clocks.mem", "pcie.link.gen.current", "pcie.link.width.current",
)  # fmt: skip
_SMI_SECONDS = 20
_LEAST_SHARE_OF_CLOCK = 0.7
_COPY_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}
_MATMUL_SIZE = {"cuda": 4096, "cpu": 512}


def device_section(device: torch.device, *, quick: bool) -> Section:
    """Return the findings about devices.

    Args:
        quick: leave out everything that puts something on a GPU, on which a training may be running.
    """
    findings = [*_gpus(), *_nvidia_smi()]
    if not quick:
        findings += [*bandwidths(device), *_links()]
        if device.type == "cuda":
            findings.append(_clock_under_load(device))
    return Section("devices", findings)


def _gpus() -> Iterator[Finding]:
    if torch.cuda.is_available():
        yield Finding("GPUs", str(torch.cuda.device_count()))
    elif torch.version.cuda is None:
        yield Finding("GPUs", "none", "note", "torch is built without CUDA")
    else:
        yield Finding("GPUs", "none", "note", "torch finds no driver or no device; everything runs on the CPU")


def ask_nvidia_smi(*arguments: str) -> str | None:
    """Return the output of nvidia-smi; None if the program is missing or fails."""
    try:
        output = subprocess.run(["nvidia-smi", *arguments], capture_output=True, timeout=_SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.decode("utf-8", "replace")


def driver_version() -> str:
    """Return the version of NVIDIA's driver, or "absent"."""
    lines = (ask_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader") or "").split()
    return lines[0] if lines else "absent"


def _nvidia_smi() -> Iterator[Finding]:
    answer = ask_nvidia_smi(f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader")
    if answer is None:
        if torch.cuda.is_available():
            yield Finding("nvidia-smi", "no answer", "warning", "clocks, power and links are not known")
        return
    for line in answer.strip().splitlines():
        yield _describe_gpu(dict(zip(_SMI_FIELDS, (value.strip() for value in line.split(",")), strict=False)))


def _describe_gpu(gpu: dict[str, str]) -> Finding:
    detail = (
        f"driver {gpu['driver_version']}, {gpu['memory.total']}, power limit {gpu['power.limit']}, {gpu['temperature.gpu']} C, "
        f"SM clock {gpu['clocks.sm']} of {gpu['clocks.max.sm']}, memory clock {gpu['clocks.mem']}, "
        f"PCIe {gpu['pcie.link.gen.current']} x{gpu['pcie.link.width.current']}"
    )
    return Finding(f"GPU {gpu['index']}", gpu["name"], detail=detail)


def _links() -> Iterator[Finding]:
    """Yield the links between the GPUs of the host: peer access as torch reports it, and kinds of links as nvidia-smi does."""
    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        return
    pairs = [(one, other) for one in range(num_gpus) for other in range(num_gpus) if one != other]
    without = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    kinds = link_kinds(ask_nvidia_smi("topo", "-m") or "")
    value = ", ".join(f"{kind} x {count}" for kind, count in kinds.items()) or "not known"
    if without:
        yield Finding("links", value, "warning", f"no peer access between {', '.join(f'{one}-{other}' for one, other in without)}")
    else:
        yield Finding("links", value, detail="peer access between all GPUs")


def link_kinds(topology: str) -> dict[str, int]:
    """Count the links between pairs of GPUs by kind in the output of ``nvidia-smi topo -m``.

    NV18 stands for 18 NVLinks; SYS, NODE, PHB, PXB and PIX for links over PCIe.
    """
    cells = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in topology.splitlines()]
    # The heading also begins with GPU0, but only a row has an X in its own column.
    rows = [row[1:] for row in cells if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    kinds: dict[str, int] = {}
    for number, row in enumerate(rows):
        for kind in row[number + 1 : len(rows)]:
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def bandwidths(device: torch.device) -> Iterator[Finding]:
    """Yield the speed of copies to and from the GPU (pinned memory) and inside it, and of a matrix product; on a CPU only the last two."""
    num_bytes = _COPY_BYTES[device.type]
    here, there = (torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    here.zero_()
    there.zero_()
    if device.type == "cuda":
        host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        yield _speed("copy to the GPU", num_bytes, best_seconds(lambda: here.copy_(host, non_blocking=True), device))
        yield _speed("copy from the GPU", num_bytes, best_seconds(lambda: host.copy_(here, non_blocking=True), device))
    # A copy reads and writes every byte once.
    yield _speed("copy in memory", 2 * num_bytes, best_seconds(lambda: here.copy_(there), device))
    size = _MATMUL_SIZE[device.type]
    yield Finding("matrix product, bf16", f"{matmul_tflops(device):,.2f} TFLOP/s", detail=f"{size} x {size}")


def matmul_tflops(device: torch.device) -> float:
    """Return the TFLOP/s of a product of square bf16 matrices."""
    size = _MATMUL_SIZE[device.type]
    one, other = (torch.ones((size, size), dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: one @ other, device) / 1e12


def best_seconds(work: Callable[[], object], device: torch.device, repetitions: int = 5) -> float:
    """Return the seconds of the fastest of several runs: other work on the machine can only make runs longer."""
    work()
    shortest = float("inf")
    for _ in range(repetitions):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        shortest = min(shortest, time.perf_counter() - began)
    return shortest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _speed(name: str, num_bytes: int, seconds: float) -> Finding:
    return Finding(name, f"{num_bytes / seconds / 1e9:,.1f} GB/s")


def _clock_under_load(device: torch.device) -> Finding:
    """Return the SM clock under load. A GPU that is too hot or has too little power lowers its clock only while it computes."""
    size = 2 * _MATMUL_SIZE["cuda"]
    one = torch.ones((size, size), dtype=torch.bfloat16, device=device)
    for _ in range(1000):  # more than a second on an H100, because nvidia-smi needs time to start
        one @ one
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    answer = ask_nvidia_smi("--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}")
    _wait(device)
    clocks = re.findall(r"\d+", answer or "")
    if len(clocks) != 2:
        return Finding("SM clock under load", "not known", "note")
    now, largest = map(int, clocks)
    slow = now < _LEAST_SHARE_OF_CLOCK * largest
    return Finding("SM clock under load", f"{now} MHz", "warning" if slow else "ok", f"{now / largest:.0%} of {largest} MHz")
