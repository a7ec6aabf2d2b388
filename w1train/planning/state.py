"""Bytes of parameters, gradients and optimizer states, exactly as megatron-core allocates them.

Gradients are in one flat fp32 buffer per chunk, and those of routed experts in a second buffer, because fewer ranks sum them up. With the
distributed optimizer the parameters are views of a flat buffer of the same layout, which is padded so that every rank's share starts on a
boundary; each rank keeps fp32 masters (of bf16 parameters) and the fp32 moments of the parameters in its share, without the padding. A
matrix of Muon has one moment, any other parameter two. A frozen parameter is outside of the buffers, and is whole on each rank.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace

from w1train.engine.matrices import is_matrix
from w1train.planning.layout import Layout, Precision
from w1train.planning.parameters import Parameter

FP32_BYTES = 4
PRECISION_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128


@dataclass(frozen=True, slots=True)
class Bucket:
    """A part of the flat buffer that is divided into equal shares."""

    start: int
    end: int
    """End in elements, padding included."""
    spans: tuple[tuple[int, int], ...]
    """Start and end of each parameter, in ascending order."""
    parameters: tuple[Parameter, ...]
    """The parameters of the spans."""


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of parameters, gradients and optimizer states on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    num_updated: int
    """Elements of parameters that this rank updates."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: StateBytes) -> StateBytes:
        return StateBytes(*map(operator.sub, astuple(self), astuple(other)))


def buffer_layout(parameters: Sequence[Parameter], num_shards: int, bucket_size: int | None = None) -> list[Bucket]:
    """Return the place of each parameter, as DistributedOptimizer.compute_full_param_layout computes it.

    Parameters are in reverse order, and each begins at a multiple of 64 elements; a bucket ends at a multiple of lcm(shards, 128).
    A parameter with a bucket of its own begins and ends that bucket. Other parameters share a bucket until it has ``bucket_size``
    elements; None = no bound, because their reduction does not overlap the backward pass.
    """
    buckets: list[Bucket] = []
    spans: list[tuple[int, int]] = []
    inside: list[Parameter] = []
    start = position = 0

    def close(end: int) -> int:
        nonlocal spans, inside
        padded = _round_up(end, math.lcm(num_shards, _BUCKET_ALIGNMENT))
        buckets.append(Bucket(start, padded, tuple(spans), tuple(inside)))
        spans, inside = [], []
        return padded

    for parameter in reversed(parameters):
        position = _round_up(position, _PARAMETER_ALIGNMENT)
        if parameter.has_own_bucket and spans:
            start = position = close(position)
        spans.append((position, position + parameter.numel))
        inside.append(parameter)
        position += parameter.numel
        if parameter.has_own_bucket or (bucket_size is not None and position - start >= bucket_size):
            start = position = close(position)
    if spans:
        close(position)
    return buckets


def shard_numels(buckets: Sequence[Bucket], num_shards: int, counts: Callable[[Parameter], bool] = lambda _: True) -> list[int]:
    """Return the elements of those parameters that count, in each rank's shares of all buckets."""
    numels, changes = [0] * num_shards, [0] * num_shards
    for bucket in buckets:
        size = (bucket.end - bucket.start) // num_shards
        spans = (span for span, parameter in zip(bucket.spans, bucket.parameters, strict=True) if counts(parameter))
        for start, end in spans:
            first, last = (start - bucket.start) // size, (end - 1 - bucket.start) // size
            for shard in {first, last}:
                low = bucket.start + shard * size
                numels[shard] += min(end, low + size) - max(start, low)
            if last - first > 1:
                # The shares between the first and the last belong to the parameter as a whole. There may be hundreds of them.
                changes[first + 1] += size
                changes[last] -= size
    return [at_ends + between for at_ends, between in zip(numels, itertools.accumulate(changes), strict=True)]


def has_one_moment(optimizer: str, name: str) -> bool:
    """Tell whether an optimizer has one moment of the parameter of this name, and not two."""
    return optimizer == "muon" and is_matrix(name)


@dataclass(frozen=True, slots=True)
class RankState:
    """Bytes on one rank of the routed experts, and of everything else."""

    others: StateBytes
    experts: StateBytes

    @property
    def total(self) -> int:
        return self.others.total + self.experts.total


def stage_state_bytes(
    chunks: Sequence[Sequence[Parameter]], layout: Layout, pipeline_rank: int, precision: Precision, optimizer: str
) -> list[RankState]:
    """Return the bytes of the ranks of a pipeline stage that has these chunks, in the order of ``layout.shards``."""

    def of_kind(num_shards: int, *, is_expert: bool) -> list[StateBytes]:
        own = [parameter for parameters in chunks for parameter in parameters if parameter.is_expert == is_expert]
        frozen = sum(parameter.numel for parameter in own if not parameter.is_trained)
        states = state_bytes(
            [[each for each in parameters if each.is_expert == is_expert and each.is_trained] for parameters in chunks],
            precision,
            num_shards,
            distributed=layout.distributed_optimizer,
            optimizer=optimizer,
            bucket_size=layout.bucket_size(pipeline_rank),
        )
        return [replace(state, parameters=state.parameters + PRECISION_BYTES[precision] * frozen) for state in states]

    others, experts = of_kind(layout.num_optimizer_shards, is_expert=False), of_kind(layout.expert_data, is_expert=True)
    return [RankState(others[shard], experts[expert_shard]) for shard, expert_shard in layout.shards]


def state_bytes(
    chunks: Sequence[Sequence[Parameter]],
    precision: Precision,
    num_shards: int,
    *,
    distributed: bool,
    optimizer: str,
    bucket_size: int | None = None,
) -> list[StateBytes]:
    """Return the bytes of each rank that has these parameters of one kind, in the order of the ``num_shards`` ranks that share them.

    fp32 parameters are their own masters, so the optimizer has only the moments.

    Args:
        optimizer: the optimizer's name.
    """
    element = PRECISION_BYTES[precision]
    masters_and_moments = 3 if precision == "bf16" else 2
    buffer, owned, with_one_moment = 0, [0] * num_shards, [0] * num_shards

    def one_moment(parameter: Parameter) -> bool:
        return has_one_moment(optimizer, parameter.name)

    for parameters in chunks:
        if distributed and parameters:
            buckets = buffer_layout(parameters, num_shards, bucket_size)
            buffer += buckets[-1].end
            owned = _added(owned, shard_numels(buckets, num_shards))
            if any(map(one_moment, parameters)):
                with_one_moment = _added(with_one_moment, shard_numels(buckets, num_shards, one_moment))
        else:
            numel = sum(parameter.numel for parameter in parameters)
            buffer += numel
            owned = [total + numel for total in owned]
            one = sum(parameter.numel for parameter in parameters if one_moment(parameter))
            with_one_moment = [total + one for total in with_one_moment]
    return [
        StateBytes(element * buffer, FP32_BYTES * buffer, FP32_BYTES * (masters_and_moments * numel - one), numel)
        for numel, one in zip(owned, with_one_moment, strict=True)
    ]


def _added(totals: list[int], more: list[int]) -> list[int]:
    return [total + numel for total, numel in zip(totals, more, strict=True)]


def staging_bytes(state: StateBytes, precision: Precision, num_shards: int, *, distributed: bool) -> float:
    """Return about how many bytes of host memory a rank needs for the copy of its part of a checkpoint.

    Ranks that have the same weights divide them among themselves, and also states that are not sharded. In fp32 the distributed optimizer
    saves the weights as masters as well.
    """
    if not distributed:
        return (state.parameters + state.optimizer) / num_shards
    return state.parameters / num_shards + state.optimizer + (FP32_BYTES * state.num_updated if precision == "fp32" else 0)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
