"""Measurement of times, memory and errors of the sides of one workload.

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
from w1train.config.errors import first_line
from w1train.config.rules.attention_limits import AttentionCase
from w1train.diagnosis.kernel_checks import relative_errors

logger = logging.getLogger(__name__)

LARGEST_ERROR = 2e-2
"""The largest relative error of a tensor in bf16. A side with a larger error counts as wrong."""
# Floating-point operations for each visible pair, head and channel. The backward pass computes the scores again, as every kernel does.
_FORWARD_FLOPS, _BACKWARD_FLOPS = 4, 10
_SECONDS_A_SIDE, _FEWEST_TURNS, _PLAN_TURNS = 2.0, 3, 3
_CHECKED_ROWS = 2048


@dataclass(slots=True)
class Measured:
    """The measurements of one side of one workload."""

    workload: str
    side: str
    dense: str | None
    """The name of the side with the same library's dense kernel."""
    flops: float
    """Floating-point operations of the forward pass, on visible pairs; for a dense kernel, on all pairs. The backward pass has 2.5 times
    as many."""
    reason: str | None = None
    """The reason why the side was not measured."""
    failed: bool = False
    """This flag tells whether the side should have computed the workload, and raised an error or was wrong."""
    error: float | None = None
    """The largest relative error of output and gradients. None for a dense kernel, which does not compute the workload."""
    forward: list[float] = field(default_factory=list)
    """Seconds of each turn."""
    backward: list[float] = field(default_factory=list)
    plan: float | None = None
    """Seconds to make the plan that the kernels read, once for each micro-batch, with the host's work."""
    plan_bytes: int | None = None
    peak_bytes: int | None = None
    """The most bytes that the forward and backward pass held, without their inputs."""

    @property
    def seconds(self) -> float | None:
        """Seconds of the forward and backward pass: the sum of their medians."""
        return statistics.median(self.forward) + statistics.median(self.backward) if self.forward else None

    @property
    def tflops(self) -> float | None:
        """TFLOP/s of the forward and backward pass, counting the pairs that had to be computed."""
        total = self.flops * (1 + _BACKWARD_FLOPS / _FORWARD_FLOPS)
        return None if self.seconds is None else total / self.seconds / 1e12

    @property
    def memory(self) -> int | None:
        """Bytes that the passes held, and the bytes of the plan."""
        return None if self.peak_bytes is None else self.peak_bytes + (self.plan_bytes or 0)


@dataclass(slots=True)
class _Runner:
    """A side that can compute the workload, and its plan."""

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
    """Measure all sides in turns on the same inputs. A side that raises an error is a row with the error."""
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
        # Every exception is caught: the errors of the libraries have no common class, and a side that fails must not lose the numbers of
        # the others. The error becomes a row, its traceback is logged, and the exit status is 1.
        except Exception as error:
            logger.exception("%s cannot compute %s", side.name, workload.name)
            row.reason, row.failed = f"failed: {type(error).__name__}: {first_line(error)[:120]}", True
            _forget(device)
            continue
        if row.error is not None and not row.error <= LARGEST_ERROR:
            row.reason, row.failed = f"wrong: relative error {row.error:.1e}", True
            continue
        runners[side.name] = runner
    _take_turns({row.side: row for row in rows}, runners, clock, repetitions)
    return rows


def _random_inputs(visibility: Visibility, case: AttentionCase) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return query, key and value [b, n or g, q or k, d] as views of megatron-core's layout, and the output's gradient."""
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
    """Return the reason if the unfused side would not fit. It would allocate much memory before it fails."""
    if side.name != "unfused" or device.type != "cuda":
        return None
    scores = 2 * visibility.endpoints[0].numel() * visibility.num_keys * case.num_heads
    free, _ = torch.cuda.mem_get_info(device)
    # 4 tensors: scores, probabilities and the gradients of both.
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
    """Compile a side, time its plan into ``row``, and return the side ready to run."""
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
    """Return output and gradients of the first key/value head and its r query heads, by an explicit softmax in fp32, some rows at a
    time."""
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
    """Time the sides in turns. Each turn begins with another side, so that other work of the device disturbs all sides equally. Slow sides
    take fewer turns."""
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
    """Release the memory that a side held when it failed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
