"""The work of Muon beside AdamW's: the exchange of the matrices' elements, and the orthogonalizations of the ranks that own them.

Owners and rounds are computed by the functions that training uses, so bytes and FLOPs are those of the run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from w1train.config.schema import ModelConfig
from w1train.engine.matrices import (
    Range,
    fusion,
    is_matrix,
    iteration_flops,
    logical_shapes,
    owners,
    part_of_ranges,
    rounds,
    shared_ranges,
    stack,
)
from w1train.planning.communication_time import Group, Traffic
from w1train.planning.layout import Layout
from w1train.planning.parameters import Parameter
from w1train.planning.state import FP32_BYTES, buffer_layout


@dataclass(frozen=True, slots=True)
class MuonWork:
    """The exchange and the orthogonalizations of a step, on the ranks of one pipeline stage that have most of them."""

    traffic: list[Traffic]
    flops: int


@dataclass(frozen=True, slots=True)
class _Kind:
    """The ranks that share the matrices of routed experts, or all other matrices."""

    is_expert: bool
    num_tensor: int
    num_shards: int
    """Ranks that each update a part of the elements."""


def muon_work(model: ModelConfig, layout: Layout, pipeline_rank: int, chunks: Sequence[Sequence[Parameter]]) -> MuonWork:
    """Return Muon's work, from the parameters of the chunks of a pipeline rank. The rank that has most of the work for experts is assumed
    to have most of the other work too."""
    is_sharded = layout.distributed_optimizer
    kinds = (
        _Kind(False, layout.tensor, layout.num_optimizer_shards if is_sharded else 1),
        _Kind(True, layout.expert_tensor, layout.expert_data if is_sharded else 1),
    )
    works = []
    for kind in kinds:
        own = [[parameter for parameter in parameters if parameter.is_expert == kind.is_expert] for parameters in chunks]
        works.append(_work(model, kind, own, layout.bucket_size(pipeline_rank) if is_sharded else None, is_sharded=is_sharded))
    return MuonWork([item for work in works for item in work.traffic], sum(work.flops for work in works))


def _work(model: ModelConfig, kind: _Kind, chunks: Sequence[Sequence[Parameter]], bucket_size: int | None, *, is_sharded: bool) -> MuonWork:
    places = _ranges(kind, chunks, bucket_size, is_sharded=is_sharded)
    matrices = [
        (parameter, index) for own in chunks for parameter in own if is_matrix(parameter.name) for index in range(_number(parameter))
    ]
    ranges = [part_of_ranges(places[matrix.name], index, matrix.numel // _number(matrix)) for matrix, index in matrices]
    flops = [_flops(matrix, model, kind.num_tensor) for matrix, _ in matrices]
    chosen = owners(ranges, flops, kind.num_tensor)
    sent, work = [0] * kind.num_shards * kind.num_tensor, [0] * kind.num_shards * kind.num_tensor
    for of_ranks, cost, owner in zip(ranges, flops, chosen, strict=True):
        work[owner] += cost
        holders = ((rank, end - start) for rank, (start, end) in enumerate(of_ranks) if start < end)
        for (rank, numel), tensor in itertools.product(holders, range(kind.num_tensor)):
            # The elements travel to the owner, and the elements of the update travel back.
            if (place := rank * kind.num_tensor + tensor) != owner:
                sent[place] += numel
                sent[owner] += numel
    if len(sent) == 1 or not matrices:
        return MuonWork([], max(work))
    group: Group = "data" if kind.num_shards > 1 else "tensor"
    of_experts: Group = "expert_data" if kind.num_shards > 1 else "expert_tensor"
    name = "Muon's matrices of experts" if kind.is_expert else "Muon's matrices"
    calls, size = 2 * len(rounds(chosen)), FP32_BYTES * max(sent)
    return MuonWork([Traffic(name, of_experts if kind.is_expert else group, "send", len(sent), calls, size, True)], max(work))


def _ranges(kind: _Kind, chunks: Sequence[Sequence[Parameter]], bucket_size: int | None, *, is_sharded: bool) -> dict[str, list[Range]]:
    """Return the elements of each parameter with matrices that each data-parallel rank updates."""
    shards = kind.num_shards
    if not is_sharded:
        return {parameter.name: [(0, parameter.numel)] for parameters in chunks for parameter in parameters}
    return {
        parameter.name: shared_ranges(*span, bucket.start, (bucket.end - bucket.start) // shards, shards)
        for parameters in chunks
        for bucket in buffer_layout(parameters, shards, bucket_size)
        for span, parameter in zip(bucket.spans, bucket.parameters, strict=True)
        if is_matrix(parameter.name)
    }


def _number(parameter: Parameter) -> int:
    """Return the number of matrices in a parameter, which is that of a rank's experts or 1."""
    return stack(parameter.name, parameter.shape)[0]


def _flops(parameter: Parameter, model: ModelConfig, num_tensor: int) -> int:
    """Return the FLOPs of the orthogonalization of one matrix of a parameter."""
    _, shape = stack(parameter.name, parameter.shape)
    return sum(map(iteration_flops, logical_shapes(fusion(parameter.name, shape[0], model), shape, num_tensor)))
