"""Checks of collectives over all ranks, in seconds: whether results are right, how fast each size is, and which rank is slow.

Every rank calls the same functions in the same order, and they return the same on all ranks.

Shapes: n = elements of a rank's piece, w = ranks.
"""

from __future__ import annotations

import datetime
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from w1train.diagnosis.devices import matmul_tflops
from w1train.diagnosis.findings import Finding, Section, Status

TIMEOUT = datetime.timedelta(seconds=120)
"""Time after which a missing rank ends the test on the other ranks."""
_SIZES = {"cpu": (2**12, 2**18, 2**22, 2**24), "cuda": (2**12, 2**20, 2**24, 2**28)}
_NEIGHBOUR_BYTES = {"cpu": 2**22, "cuda": 2**26}
_SLOW = 1.5
"""A rank is called slow when it takes more than this many times the median."""


@dataclass(slots=True)
class Collective:
    """A collective on one size: the call, and the result that it must give."""

    name: str
    call: Callable[[], Any]
    output: Tensor
    expected: Tensor
    moved: float
    """The least number of bytes that each rank's link must carry, as in the busbw of nccl-tests."""


def initialize(device: torch.device) -> None:
    """Set up the default group of torchrun's ranks."""
    on_gpu = device.type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=device if on_gpu else None)


def collective_section(device: torch.device, seconds: float, same: dict[str, Any], failed: list[str], warned: list[str]) -> Section:
    """Return the findings of all checks, which take about ``seconds``.

    Args:
        same: values that should be the same on all ranks (versions, the kind of GPU).
        failed: names of findings that failed on this rank.
        warned: names of findings with a warning about this rank's host; only one rank of each host passes them.

    Raises:
        RuntimeError: a rank has ended, or does not arrive within TIMEOUT.
    """
    sizes = _SIZES[device.type]
    share = seconds / (3 * len(sizes))
    findings = [*_agreement(same), _everywhere("kernels", failed, "failed"), _everywhere("hosts", warned, "warning")]
    for size in sizes:
        findings += [_measure(collective, size, device, share) for collective in collectives(size, device)]
    findings += [*rank_speeds(device)]
    return Section(f"{dist.get_world_size()} ranks on {device.type}", findings)


def _agreement(values: dict[str, Any]) -> Iterator[Finding]:
    """Yield whether all ranks have the values of rank 0: ranks with other versions compute other numbers, or hang."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    for name, value in everyone[0].items():
        others = {rank: of_rank[name] for rank, of_rank in enumerate(everyone) if of_rank[name] != value}
        detail = "; ".join(f"rank {rank} has {other}" for rank, other in others.items())
        yield Finding(f"{name} of all ranks", str(value), "failed" if others else "ok", detail)


def _everywhere(what: str, complaints: list[str], status: Status) -> Finding:
    """Return a finding with the complaints of all ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), complaints))
    found = [f"rank {rank} ({host}): {', '.join(texts)}" for rank, (host, texts) in enumerate(everyone) if texts]
    return Finding(f"{what} of all ranks", "not right" if found else "right", status if found else "ok", "; ".join(found))


def collectives(num_bytes: int, device: torch.device) -> Iterator[Collective]:
    """Yield all_reduce, all_gather and reduce_scatter of ``num_bytes``, over the pieces of all ranks.

    The values are small whole numbers in fp32, whose sums are exact in any order.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    piece = max(num_bytes // 4 // world_size, 1)
    whole = piece * world_size
    pattern = torch.arange(whole, device=device, dtype=torch.int32).remainder(13).float()
    total = pattern * world_size + world_size * (world_size - 1) / 2
    share = 4 * whole * (world_size - 1) / world_size
    mine = slice(rank * piece, (rank + 1) * piece)

    # The inputs of two ranks differ by a constant, so that a contribution that is lost or counted twice shows in every element.
    summed = pattern + rank
    yield Collective("all_reduce", lambda: dist.all_reduce(summed), summed, total, 2 * share)
    gathered = torch.full_like(pattern, float("nan"))
    own = pattern[mine].clone()
    yield Collective("all_gather", lambda: dist.all_gather_into_tensor(gathered, own), gathered, pattern, share)
    scattered = torch.full_like(own, float("nan"))
    contribution = pattern + rank
    yield Collective("reduce_scatter", lambda: dist.reduce_scatter_tensor(scattered, contribution), scattered, total[mine], share)


def _measure(collective: Collective, num_bytes: int, device: torch.device, seconds: float) -> Finding:
    collective.call()
    wrong = ranks_where(not torch.equal(collective.output, collective.expected))
    each = _seconds_of(collective.call, device, seconds)
    name = f"{collective.name} {_size(num_bytes)}"
    speed = f"{collective.moved / each / 1e9:,.3f} GB/s"
    if wrong:
        return Finding(name, "WRONG RESULT", "failed", f"on rank {', '.join(map(str, wrong))} of {dist.get_world_size()}")
    return Finding(name, speed, detail=f"{each * 1e6:,.0f} us, results right")


def ranks_where(condition: bool) -> list[int]:
    """Return the ranks on which the condition holds."""
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, condition)
    return [rank for rank, answer in enumerate(answers) if answer]


def _seconds_of(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Return the seconds of one call on the slowest rank. Every rank makes the same number of calls."""
    first = _largest(_timed(call, device, 1))
    repetitions = max(1, min(1000, int(seconds / max(first, 1e-6))))
    return _largest(_timed(call, device, repetitions)) / repetitions


def _timed(call: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    dist.barrier()
    began = time.perf_counter()
    for _ in range(repetitions):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _largest(value: float) -> float:
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def rank_speeds(device: torch.device) -> Iterator[Finding]:
    """Yield the rank that computes most slowly, and the rank whose link to the next rank is slowest.

    These are timed separately, because in a collective all ranks end together, whichever rank is late.
    """
    yield slowest("matrix product", 1 / matmul_tflops(device))
    yield slowest("link to the next rank", _neighbour_seconds(device))


def _neighbour_seconds(device: torch.device) -> float:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sent, received = (torch.zeros(_NEIGHBOUR_BYTES[device.type] // 4, device=device) for _ in range(2))

    def exchange() -> None:
        operations = [
            dist.P2POp(dist.isend, sent, (rank + 1) % world_size),
            dist.P2POp(dist.irecv, received, (rank - 1) % world_size),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    exchange()
    return _timed(exchange, device, 5) / 5


def slowest(name: str, cost: float) -> Finding:
    """Name the rank with the largest cost (a time, or the inverse of a speed)."""
    costs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(costs, (cost, f"{socket.gethostname()}, local rank {os.environ.get('LOCAL_RANK', '0')}"))
    rank = max(range(len(costs)), key=lambda number: costs[number][0])
    ratio = costs[rank][0] / statistics.median_low(value for value, _ in costs)
    detail = f"rank {rank} ({costs[rank][1]}) takes {ratio:.2f} times the median"
    return Finding(f"slowest rank, {name}", f"rank {rank}", "warning" if ratio > _SLOW else "ok", detail)


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 2**20 else f"{num_bytes >> 10} KiB"
