"""The work of Muon beside AdamW's: the exchange of the matrices' elements, and the orthogonalizations of the ranks that own them.

Owners and rounds are computed by the functions that training uses, so bytes and FLOPs are those of the run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from w1train.config.schema import ModelConfig
from w1train.engine.matrices import Range, fusion, is_matrix, iteration_flops, logical_shapes, owners, rounds, shared_ranges
from w1train.planning.communication_time import Group, Traffic
from w1train.planning.layout import Layout
from w1train.planning.parameters import Parameter
from w1train.planning.state import FP32_BYTES, buffer_layout


@dataclass(frozen=True, slots=True)
class MuonWork:
    """The exchange and the orthogonalizations of a step, on the ranks of one pipeline stage that have most of them."""

    traffic: list[Traffic]
    flops: int


def muon_work(model: ModelConfig, layout: Layout, pipeline_rank: int, chunks: Sequence[Sequence[Parameter]]) -> MuonWork:
    """Return Muon's work, from the parameters of the chunks of a pipeline rank."""
    places = _ranges(layout, pipeline_rank, chunks)
    matrices = [parameter for parameters in chunks for parameter in parameters if is_matrix(parameter.name)]
    ranges, flops = [places[matrix.name] for matrix in matrices], [_flops(matrix, model, layout) for matrix in matrices]
    chosen = owners(ranges, flops, layout.tensor)
    num_shards = layout.num_optimizer_shards if layout.distributed_optimizer else 1
    sent, work = [0] * num_shards * layout.tensor, [0] * num_shards * layout.tensor
    for of_ranks, cost, owner in zip(ranges, flops, chosen, strict=True):
        work[owner] += cost
        holders = ((rank, end - start) for rank, (start, end) in enumerate(of_ranks) if start < end)
        for (rank, numel), tensor in itertools.product(holders, range(layout.tensor)):
            # The elements travel to the owner, and the elements of the update travel back.
            if (place := rank * layout.tensor + tensor) != owner:
                sent[place] += numel
                sent[owner] += numel
    if len(sent) == 1 or not matrices:
        return MuonWork([], max(work))
    group: Group = "data" if num_shards > 1 else "tensor"
    calls = 2 * len(rounds(chosen))
    return MuonWork([Traffic("Muon's matrices", group, "send", len(sent), calls, FP32_BYTES * max(sent), True)], max(work))


def _ranges(layout: Layout, pipeline_rank: int, chunks: Sequence[Sequence[Parameter]]) -> dict[str, list[Range]]:
    """Return the elements of each matrix that each data-parallel rank updates."""
    shards = layout.num_optimizer_shards
    if not layout.distributed_optimizer:
        return {parameter.name: [(0, parameter.numel)] for parameters in chunks for parameter in parameters}
    return {
        parameter.name: shared_ranges(*span, bucket.start, (bucket.end - bucket.start) // shards, shards)
        for parameters in chunks
        for bucket in buffer_layout([p for p in parameters if not p.is_expert], shards, layout.bucket_size(pipeline_rank))
        for span, parameter in zip(bucket.spans, bucket.parameters, strict=True)
        if is_matrix(parameter.name)
    }


def _flops(matrix: Parameter, model: ModelConfig, layout: Layout) -> int:
    rows, columns = matrix.shape
    return sum(map(iteration_flops, logical_shapes(fusion(matrix.name, rows, model), (rows, columns), layout.tensor)))
