"""Assumptions about devices, networks and kernels. This project has not measured these numbers: each has its source next to it, and
``--assume NAME=VALUE`` replaces it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from w1train.config.constraints import NonNegativeFloat, PositiveFraction, Range
from w1train.config.errors import Problem, closest, listing
from w1train.config.field_types import field_ranges
from w1train.profiling.throughput import device_peak_tflops


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator and its connections. GB/s are 1e9 bytes a second in one direction."""

    name: str
    peak_tflops: float
    """Dense bf16 peak."""
    memory_bytes: int
    memory_gb_per_second: float
    nvlink_gb_per_second: float
    """Bandwidth to the other devices of its node."""
    network_gb_per_second: float
    """Bandwidth to other nodes: each device has one InfiniBand port of 400 Gb/s."""
    devices_per_node: int = 8


def _device(name: str, memory_mib: int, memory_bandwidth: float, nvlink: float) -> Device:
    peak = device_peak_tflops(name)
    assert peak is not None
    return Device(name, peak, memory_mib * 2**20, memory_bandwidth, nvlink, network_gb_per_second=50.0)


# Memory as nvidia-smi reports it; bandwidths from NVIDIA's data sheets of the SXM parts. The H800 is an H100 whose NVLink has 400 GB/s
# for both directions together, not 900.
DEVICES = {
    "h100": _device("H100", 81559, 3350.0, 450.0),
    "h800": _device("H800", 81559, 3350.0, 200.0),
    "h200": _device("H200", 143771, 4800.0, 450.0),
}


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Achievable shares of the peaks, and overheads."""

    matmul_efficiency: PositiveFraction = 0.70
    """Share of the bf16 peak in the linear layers. A square product of size 8192 on an H100 reaches 0.8; the products of the layers are
    smaller."""
    expert_matmul_efficiency: PositiveFraction = 0.50
    """Share of the bf16 peak in the grouped products of routed experts, whose inner width is some hundreds, over the rows that their tiles
    have (w1train/planning/expert_timing.py). Our choice, which has not been measured."""
    expert_imbalance: Annotated[float, Range(1)] = 1.25
    """Rows of the expert-parallel rank that has the most, divided by their mean over ranks. Our choice: no paper gives it for a trained
    model. At random weights it grows with the share of masked tokens, which all choose the same experts, up to the number of ranks."""
    attention_efficiency: PositiveFraction = 0.46
    """Share of the bf16 peak in unmasked attention, forward and backward together. From 608 and 502 TFLOP/s of torch's SDPA on an H100 at
    8k (MagiAttention's benchmark), where the backward pass does 2.5 times the work of the forward pass; here it counts
    as twice the work."""
    masked_attention_efficiency: PositiveFraction = 0.40
    """Share of the bf16 peak with a dense mask, over ALL pairs, because torch's SDPA skips no pair. It is 11 % below unmasked attention
    (pytorch issue 138493)."""
    memory_efficiency: PositiveFraction = 0.80
    """Share of the memory bandwidth that element-wise kernels reach."""
    network_efficiency: PositiveFraction = 0.80
    """Share of the link bandwidth in collectives."""
    collective_latency: NonNegativeFloat = 20e-6
    """Seconds that the smallest collective takes."""
    reserved_gib: NonNegativeFloat = 6.0
    """Memory for the CUDA context, NCCL's buffers, cuBLAS's workspaces and fragmentation."""

    @property
    def reserved_bytes(self) -> int:
        return round(self.reserved_gib * 2**30)


def described(assumptions: Assumptions) -> dict[str, float]:
    """Return the assumptions by name, for output."""
    return dataclasses.asdict(assumptions)


def replace_assumptions(assumptions: Assumptions, overrides: Sequence[str]) -> tuple[Assumptions, list[Problem]]:
    """Apply NAME=VALUE texts, and return the problems of those that cannot be applied."""
    ranges = field_ranges(Assumptions)
    problems = []
    for text in overrides:
        name, _, value = text.partition("=")
        number = _number(value)
        if name not in ranges:
            match = closest(name, ranges)
            problems.append(Problem(f"--assume {text}", "an unknown name", listing(ranges), f"did you mean {match}?" if match else None))
        elif number is None or number not in ranges[name]:
            problems.append(Problem(f"--assume {text}", value or "nothing", f"a number {ranges[name]}"))
        else:
            assumptions = dataclasses.replace(assumptions, **{name: number})
    return assumptions, problems


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
