"""Attention on the CPU that computes few pairs besides the visible pairs: stretches of rows that see similar keys, and these keys.

A micro-batch is cut into rectangles, each of which is a stretch of rows with the union of their keys. A rectangle is one call of torch's
flash kernel, with a mask only if its rows differ. Neighbouring rows share a rectangle as long as the unnecessary pairs cost less than
another call. This rule cuts documents, blocks and the staircase of a causal mask.

Shapes: b = samples, q = query rows, k = key columns, n = query heads, g = key/value heads, r = n / g, d = channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from w1train.attention.visibility import Visibility

Intervals = tuple[tuple[int, int], ...]

# The time of a call, forward and backward, in (row, key, channel) triples that the dense kernel computes in this time on one core: 0.1 ms
# at 0.24 ns each, measured by benchmarks.attention.cpu on an AMD EPYC (benchmarks/results/).
_TRIPLES_PER_CALL = 400_000
# A call takes as much time as if it had this many more rows, because keys are copied, their gradients are added up, and products of few
# rows do not use the matrix units well. Measured: 32 to 64 were best for blocks and causal masks at widths of 64 to 1,024, and 16 or 128
# within 15 % of them.
_EXTRA_ROWS = 48
# The factor by which a mask makes pairs slower, because every layer makes the mask again and reads it.
_MASKED_COST = 1.1
# The smallest gain for which another order of summation is acceptable.
_LEAST_GAIN = 1.15


@dataclass(slots=True)
class Rectangle:
    """Rows of one sample (or of all samples, if these see the same) and the keys that any of the rows sees."""

    samples: slice
    rows: slice
    keys: Intervals
    """Disjoint intervals, in ascending order."""
    mask: Tensor | None
    """bool [rows, keys], True = visible; None = every row sees every key."""


@dataclass(slots=True)
class _Group:
    """Consecutive rows of one sample."""

    start: int
    end: int
    keys: Intervals
    num_visible: int
    """Visible pairs among the computed pairs."""

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.keys)

    @property
    def num_computed(self) -> int:
        return (self.end - self.start) * self.num_keys

    @property
    def is_uniform(self) -> bool:
        """Tell whether every row sees every key."""
        return self.num_visible == self.num_computed

    @property
    def pair_cost(self) -> float:
        """Return the cost of the computed pairs, in pairs without a mask."""
        return self.num_computed * (1.0 if self.is_uniform else _MASKED_COST)

    def call_cost(self, per_call: float) -> float:
        """Return the cost of a rectangle apart from its pairs."""
        return per_call + _EXTRA_ROWS * self.num_keys

    def joined(self, other: _Group) -> _Group:
        keys = self.keys if self.keys == other.keys else _union(self.keys + other.keys)
        return _Group(self.start, other.end, keys, self.num_visible + other.num_visible)


def rectangles_of(visibility: Visibility, width: int, num_threads: int = 1) -> list[Rectangle] | None:
    """Return the rectangles of a micro-batch, or None if dense attention is estimated to be as fast.

    Args:
        width: query heads times channels. The wider a pair is, the fewer pairs take the time of a call.
        num_threads: threads of the kernels. They share the work of the pairs, but not the fixed time of a call.
    """
    if visibility.scattered is not None:
        return None
    endpoints = visibility.endpoints
    num_samples, num_rows = endpoints.shape[1:]
    per_call = _TRIPLES_PER_CALL * num_threads / width
    dense = per_call + num_samples * (num_rows + _EXTRA_ROWS) * visibility.num_keys * _MASKED_COST
    # The search for rectangles takes as long as a layer of a small model, so it is skipped if no rectangles can be much faster than dense
    # attention.
    if _LEAST_GAIN * _least_cost(visibility, per_call) > dense:
        return None
    groups = [_merge(_runs(endpoints[:, sample]), per_call) for sample in range(num_samples)]
    if _LEAST_GAIN * sum(group.call_cost(per_call) + group.pair_cost for of_sample in groups for group in of_sample) > dense:
        return None
    return [_rectangle(visibility, sample, group) for sample, of_sample in enumerate(groups) for group in of_sample]


def _least_cost(visibility: Visibility, per_call: float) -> float:
    """Return a lower bound on the cost of any rectangles: one call for each sample that sees anything, and no pairs except the visible
    pairs."""
    pairs = visibility.pairs_per_row()
    most = pairs.amax(dim=1)
    return per_call * int((most > 0).sum()) + _EXTRA_ROWS * int(most.sum()) + int(pairs.sum())


def _runs(endpoints: Tensor) -> Iterator[_Group]:
    """Yield runs of rows with equal endpoints, int [e, q], without rows that see nothing."""
    changes = (endpoints[:, 1:] != endpoints[:, :-1]).any(dim=0)
    starts = [0, *(changes.nonzero()[:, 0] + 1).tolist()]
    bounds = torch.cat([torch.zeros_like(endpoints[:1]), endpoints])[:, starts].T.tolist()
    for start, end, row in zip(starts, [*starts[1:], endpoints.shape[1]], bounds, strict=True):
        keys = _union(tuple((first, last) for first, last in zip(row[::2], row[1::2], strict=True) if last > first))
        if keys:
            yield _Group(start, end, keys, (end - start) * sum(last - first for first, last in keys))


def _merge(runs: Iterator[_Group], per_call: float) -> list[_Group]:
    """Join runs until the unnecessary pairs of a group cost more than another call. The result costs at most twice as much as the best
    cuts.

    The pairs of the whole group are compared with the call. If each row of a causal mask were compared by itself, another call would never
    be cheaper, and all rows would be joined.
    """
    groups: list[_Group] = []
    for run in runs:
        if groups and groups[-1].end == run.start:
            joined = groups[-1].joined(run)
            if joined.pair_cost - joined.num_visible <= run.call_cost(per_call):
                groups[-1] = joined
                continue
        groups.append(run)
    return groups


def _union(intervals: Intervals) -> Intervals:
    """Return the union as disjoint intervals in ascending order. Intervals that touch become one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _rectangle(visibility: Visibility, sample: int, group: _Group) -> Rectangle:
    rows = slice(group.start, group.end)
    mask = None
    if not group.is_uniform:
        part = Visibility(visibility.endpoints[:, sample : sample + 1, rows], visibility.num_keys)
        keys = torch.cat([torch.arange(start, end, dtype=torch.int32) for start, end in group.keys])
        mask = part.inside(keys)[0]
    # The endpoints of one sample may stand for all samples.
    samples = slice(None) if visibility.endpoints.shape[1] == 1 else slice(sample, sample + 1)
    return Rectangle(samples, rows, group.keys, mask)


def attend_rectangles(query: Tensor, key: Tensor, value: Tensor, rectangles: Sequence[Rectangle], scale: float | None = None) -> Tensor:
    """Return attention [b, n, q, d], from query [b, n, q, d], key and value [b, g, k, d]. It is zero in rows that are in no rectangle."""
    return _AttendRectangles.apply(query, key, value, rectangles, scale)


class _AttendRectangles(torch.autograd.Function):
    """Attention by rectangles with a backward pass of its own. Autograd would make a gradient of the size of all keys for each rectangle.

    It calls the kernels of torch's CPU flash attention, with the heads that share keys concatenated as rows.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rectangles: Sequence[Rectangle], scale: float | None) -> Tensor:
        grouped = query.unflatten(1, (key.shape[1], -1))
        output = torch.zeros_like(grouped, memory_format=torch.contiguous_format)
        normalizers = []
        for rectangle in rectangles:
            rows, keys, values, mask = _operands(rectangle, grouped, key, value)
            part, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                rows, keys, values, 0.0, False, attn_mask=mask, scale=scale
            )
            _write(rectangle, output, part)
            normalizers.append(normalizer)
        output = output.flatten(1, 2)
        ctx.save_for_backward(query, key, value, output, *normalizers)
        ctx.rectangles, ctx.scale = rectangles, scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *normalizers = ctx.saved_tensors
        query, output, gradient = (tensor.unflatten(1, (key.shape[1], -1)) for tensor in (query, output, gradient))
        query_gradient = torch.zeros_like(query, memory_format=torch.contiguous_format)
        key_gradient, value_gradient = torch.zeros_like(key), torch.zeros_like(value)
        for rectangle, normalizer in zip(ctx.rectangles, normalizers, strict=True):
            rows, keys, values, mask = _operands(rectangle, query, key, value)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _rows_of(rectangle, gradient),
                rows,
                keys,
                values,
                _rows_of(rectangle, output),
                normalizer,
                0.0,
                False,
                attn_mask=mask,
                scale=ctx.scale,
            )
            _write(rectangle, query_gradient, parts[0])
            _add(rectangle, key_gradient, parts[1])
            _add(rectangle, value_gradient, parts[2])
        return query_gradient.flatten(1, 2), key_gradient, value_gradient, None, None


def _operands(rectangle: Rectangle, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return what the kernel reads (rows, keys, values and additive mask), from query [b, g, r, q, d], key and value [b, g, k, d]."""
    bias = None
    if rectangle.mask is not None:
        bias = torch.zeros(rectangle.mask.shape, dtype=query.dtype).masked_fill_(~rectangle.mask, float("-inf"))
        bias = bias.repeat(query.shape[2], 1)[None, None]
    return _rows_of(rectangle, query), _keys_of(rectangle, key), _keys_of(rectangle, value), bias


def _rows_of(rectangle: Rectangle, tensor: Tensor) -> Tensor:
    """Return the rectangle's rows of a tensor [b, g, r, q, d], as [b, g, r * rows, d]."""
    return tensor[rectangle.samples, :, :, rectangle.rows].flatten(2, 3)


def _keys_of(rectangle: Rectangle, tensor: Tensor) -> Tensor:
    """Return the rectangle's keys of a tensor [b, g, k, d], as [b, g, keys, d]."""
    parts = [tensor[rectangle.samples, :, start:end] for start, end in rectangle.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _write(rectangle: Rectangle, target: Tensor, part: Tensor) -> None:
    """Write rows where _rows_of read them."""
    target[rectangle.samples, :, :, rectangle.rows] = part.unflatten(2, (target.shape[2], -1))


def _add(rectangle: Rectangle, target: Tensor, part: Tensor) -> None:
    """Add gradients of keys where _keys_of read the keys."""
    sizes = [end - start for start, end in rectangle.keys]
    for (start, end), piece in zip(rectangle.keys, part.split(sizes, dim=2), strict=True):
        target[rectangle.samples, :, start:end] += piece
