"""Times, memory and errors of the sides of one workload.

Shapes: b = samples, q = query rows, k = key columns, n = query heads, g = key/value heads, d = channels, r = n / g.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention.sides import Attend, Side
from benchmarks.attention.workloads import Workload
from benchmarks.common.machine import Clock, allocated_bytes, peak_bytes
from w1train.attention.backends.reference import attend_reference
from w1train.attention.visibility import Visibility
from w1train.config.rules.attention_limits import AttentionCase
from w1train.diagnosis.correctness import relative_errors

logger = logging.getLogger(__name__)

LARGEST_ERROR = 2e-2
"""Relative, of a tensor in bf16: above it a side does not compute this workload."""
# Floating-point operations for each visible pair, head and channel. The backward pass computes the scores again, as every kernel does.
_FORWARD_FLOPS, _BACKWARD_FLOPS = 4, 10
_SECONDS_A_SIDE, _FEWEST_TURNS, _PLAN_TURNS = 2.0, 3, 3
_CHECKED_ROWS = 2048


@dataclass(slots=True)
class Measured:
    """One side of one workload."""

    workload: str
    side: str
    dense: str | None
    """The side to compare with."""
    flops: float
    """Of the forward pass: the visible pairs', or all pairs' for a dense kernel. The backward pass has 2.5 times as many."""
    reason: str | None = None
    """Why there are no numbers."""
    failed: bool = False
    """It should have served, and raised, or was wrong."""
    error: float | None = None
    """Largest relative error of output and gradients; None for a dense kernel, which answers another question."""
    forward: list[float] = field(default_factory=list)
    """Seconds, one a turn."""
    backward: list[float] = field(default_factory=list)
    plan: float | None = None
    """Seconds to make what the kernels read, once a micro-batch, host included."""
    plan_bytes: int | None = None
    peak_bytes: int | None = None
    """Most that forward and backward pass held beyond their inputs."""

    @property
    def seconds(self) -> float | None:
        """Forward and backward: sum of medians."""
        return statistics.median(self.forward) + statistics.median(self.backward) if self.forward else None

    @property
    def tflops(self) -> float | None:
        """Forward and backward, over the pairs that had to be computed."""
        total = self.flops * (1 + _BACKWARD_FLOPS / _FORWARD_FLOPS)
        return None if self.seconds is None else total / self.seconds / 1e12

    @property
    def memory(self) -> int | None:
        """Bytes with the plan's."""
        return None if self.peak_bytes is None else self.peak_bytes + (self.plan_bytes or 0)


@dataclass(slots=True)
class _Runner:
    """A side that serves, with its plan."""

    attend: Attend
    plan: Any
    inputs: tuple[Tensor, Tensor, Tensor]
    upstream: Tensor
    turns: int = 0
    output: Tensor | None = None

    def forward(self) -> None:
        self.output = self.attend(*self.inputs, self.plan)

    def backward(self) -> tuple[Tensor, ...]:
        output, self.output = self.output, None
        assert output is not None
        return torch.autograd.grad(output, self.inputs, self.upstream)

    def both(self) -> list[Tensor]:
        self.forward()
        assert self.output is not None
        output = self.output.detach()
        return [output, *self.backward()]


def measure_workload(
    workload: Workload, case: AttentionCase, sides: Sequence[Side], device: torch.device, repetitions: int
) -> list[Measured]:
    """All sides, in turns on the same inputs. A side that raises is a row with what it raised."""
    clock = Clock(device)
    visibility = workload.visibility(device)
    inputs, upstream = _random_inputs(visibility, case)
    wanted = _expected(inputs, upstream, visibility)
    rows, runners = [], {}
    for side in sides:
        row = Measured(workload.name, side.name, side.dense, _forward_flops(visibility, case, side.everything))
        rows.append(row)
        row.reason = side.why_not(case, device) or _too_large(side, visibility, case, device)
        if row.reason is not None:
            continue
        try:
            runner = _prepared(row, side, case, visibility, inputs, upstream, clock, device)
            row.error = None if side.everything else _largest_error(runner.both(), wanted)
            row.peak_bytes = peak_bytes(device, runner.both)
        # Whatever it is: the libraries' errors have no common kind, and one that fails must not take the others' numbers with it. It
        # becomes a row, its trace is in the log, and the exit status says so.
        except Exception as error:
            logger.exception("%s cannot compute %s", side.name, workload.name)
            first_line = (str(error).strip().splitlines() or [""])[0]
            row.reason, row.failed = f"failed: {type(error).__name__}: {first_line[:120]}", True
            _forget(device)
            continue
        if row.error is not None and not row.error <= LARGEST_ERROR:
            row.reason, row.failed = f"wrong: relative error {row.error:.1e}", True
            continue
        runners[side.name] = runner
    _take_turns({row.side: row for row in rows}, runners, clock, repetitions)
    return rows


def _random_inputs(visibility: Visibility, case: AttentionCase) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Query, key and value [b, n or g, q or k, d] as views of megatron-core's layout, and the output's gradient."""
    generator = torch.Generator(visibility.endpoints.device).manual_seed(0)
    _, num_samples, num_rows = visibility.endpoints.shape

    def random(heads: int, length: int) -> Tensor:
        shape = (length, num_samples, heads, case.channels)
        tensor = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
        return tensor.permute(1, 2, 0, 3)

    query = random(case.num_heads, num_rows)
    key, value = (random(case.num_groups, visibility.num_keys) for _ in range(2))
    return (query.requires_grad_(), key.requires_grad_(), value.requires_grad_()), random(case.num_heads, num_rows)


def _forward_flops(visibility: Visibility, case: AttentionCase, everything: bool) -> float:
    _, num_samples, num_rows = visibility.endpoints.shape
    pairs = num_samples * num_rows * visibility.num_keys if everything else int(visibility.num_visible_pairs())
    return float(_FORWARD_FLOPS * pairs * case.num_heads * case.channels)


def _too_large(side: Side, visibility: Visibility, case: AttentionCase, device: torch.device) -> str | None:
    """The unfused side would take the memory before it fails."""
    if side.name != "unfused" or device.type != "cuda":
        return None
    scores = 2 * visibility.endpoints[0].numel() * visibility.num_keys * case.num_heads
    free, _ = torch.cuda.mem_get_info(device)
    # Scores, probabilities and the gradients of both.
    return f"its scores need 4 x {scores / 2**30:.0f} GiB" if 4 * scores > 0.9 * free else None


def _prepared(
    row: Measured,
    side: Side,
    case: AttentionCase,
    visibility: Visibility,
    inputs: tuple[Tensor, Tensor, Tensor],
    upstream: Tensor,
    clock: Clock,
    device: torch.device,
) -> _Runner:
    """Compiled, and its plan timed."""
    prepare, attend = side.make(case)
    prepare(visibility)
    clock.synchronize()
    before = allocated_bytes(device)
    runner = _Runner(attend, prepare(visibility), inputs, upstream)
    clock.synchronize()
    after = allocated_bytes(device)
    row.plan_bytes = None if before is None or after is None else after - before
    row.plan = statistics.median(clock.wall_seconds(lambda: prepare(visibility)) for _ in range(_PLAN_TURNS))
    return runner


def _expected(inputs: Sequence[Tensor], upstream: Tensor, visibility: Visibility) -> list[Tensor]:
    """Output and gradients of the first key/value head and its r query heads, by an explicit softmax in fp32, some rows at a time."""
    share = inputs[0].shape[1] // inputs[1].shape[1]
    key, value = (tensor[:, :1].detach().float().requires_grad_() for tensor in inputs[1:])
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, upstream.shape[2], _CHECKED_ROWS):
        rows = slice(start, start + _CHECKED_ROWS)
        query = inputs[0][:, :share, rows].detach().float().requires_grad_()
        mask = Visibility(visibility.endpoints[:, :, rows], visibility.num_keys).dense()
        output = attend_reference(query, key, value, mask)
        output.backward(upstream[:, :share, rows].float())
        assert query.grad is not None
        parts.append((output.detach(), query.grad))
    assert key.grad is not None
    assert value.grad is not None
    outputs, gradients = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
    return [outputs, gradients, key.grad, value.grad]


def _largest_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(relative_errors(found, wanted).values())


def _take_turns(rows: dict[str, Measured], runners: dict[str, _Runner], clock: Clock, repetitions: int) -> None:
    """Each turn begins with another side, so that what else the device does meets all alike. Slow sides take fewer turns."""
    for runner in runners.values():
        spent = sum(clock.seconds(_parts(runner)))
        runner.turns = max(min(_FEWEST_TURNS, repetitions), min(repetitions, int(_SECONDS_A_SIDE / max(spent, 1e-9))))
    names = list(runners)
    for turn in range(repetitions):
        for name in names[turn % len(names) :] + names[: turn % len(names)] if names else ():
            if turn < runners[name].turns:
                forward, backward = clock.seconds(_parts(runners[name]))
                rows[name].forward.append(forward)
                rows[name].backward.append(backward)


def _parts(runner: _Runner) -> list[Callable[[], Any]]:
    return [runner.forward, runner.backward]


def _forget(device: torch.device) -> None:
    """Give back what a side had taken when it failed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
