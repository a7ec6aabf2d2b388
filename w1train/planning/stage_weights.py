"""The weights of a pipeline rank, with the memory and the traffic that depend on them alone: neither the batch nor recomputation changes
them, so that the search computes them once for many plans."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from w1train.config.schema import Config
from w1train.config.stages import has_preferences
from w1train.planning import communication_time as communication
from w1train.planning.communication_time import Traffic
from w1train.planning.layout import Chunk, Layout, chunks_of
from w1train.planning.orthogonalization import MuonWork, muon_work
from w1train.planning.parameters import Parameter, chunk_parameters
from w1train.planning.state import PRECISION_BYTES, RankState, stage_state_bytes


@dataclass(frozen=True, slots=True)
class StageWeights:
    """The weights of the ranks of one pipeline stage."""

    kind: Hashable
    """The causes of the weights and the work of a stage of the layout, so that stages of equal kinds differ in the numbers of their layers
    alone."""
    chunks: list[Chunk]
    num_parameters: list[int]
    """Parameters of each chunk on a rank."""
    num_trained: list[int]
    """Parameters of each chunk that have gradients."""
    largest_parameter: int
    """Elements of the largest parameter that has a gradient."""
    state: RankState
    """Bytes of state on the rank that has the most."""
    reference_bytes: int
    """Bytes of the weights of the frozen reference on each rank; 0 for a run without preferences."""
    traffic: list[Traffic]
    """Collectives of gradients, parameters and Muon's matrices, once a step."""
    optimizer_flops: int


def weights_of(config: Config, layout: Layout) -> list[StageWeights]:
    """Return the weights of each pipeline rank. Neither context parallelism nor the batch changes them, and stages of equal kinds are
    computed once."""
    known: dict[Hashable, StageWeights] = {}
    stages = []
    for rank in range(layout.pipeline):
        chunks = chunks_of(layout, rank)
        kind = (layout.bucket_size(rank), *(chunk.kind for chunk in chunks))
        if kind not in known:
            known[kind] = _stage(config, layout, rank, kind)
        stages.append(replace(known[kind], chunks=chunks))
    return stages


def _stage(config: Config, layout: Layout, pipeline_rank: int, kind: Hashable) -> StageWeights:
    chunks = chunks_of(layout, pipeline_rank)
    parameters = [chunk_parameters(config.model, layout, chunk, config.adapters) for chunk in chunks]
    trained = [[parameter for parameter in own if parameter.is_trained] for own in parameters]
    states = stage_state_bytes(parameters, layout, pipeline_rank, config.training.precision, config.optimizer.name)
    has_muon = config.optimizer.name == "muon"
    muon = muon_work(config.model, layout, pipeline_rank, parameters) if has_muon else MuonWork([], 0)
    return StageWeights(
        kind=kind,
        chunks=chunks,
        num_parameters=[sum(parameter.numel for parameter in own) for own in parameters],
        num_trained=[sum(parameter.numel for parameter in own) for own in trained],
        largest_parameter=max((parameter.numel for own in trained for parameter in own), default=0),
        state=max(states, key=lambda state: state.total),
        reference_bytes=_reference_bytes(config, [parameter for own in parameters for parameter in own]),
        traffic=_traffic(config, layout, pipeline_rank, trained) + muon.traffic,
        optimizer_flops=muon.flops,
    )


def _reference_bytes(config: Config, parameters: list[Parameter]) -> int:
    if config.reference.mode != "live" or not has_preferences(config):
        return 0
    return PRECISION_BYTES[config.training.precision] * sum(parameter.numel for parameter in parameters)


def _traffic(config: Config, layout: Layout, pipeline_rank: int, parameters: list[list[Parameter]]) -> list[Traffic]:
    """Return the collectives of the parameters of each chunk that have gradients."""
    of_rank = [parameter for own in parameters for parameter in own]
    traffic: list[Traffic] = []
    num_optimizers = len({parameter.is_expert for parameter in of_rank})
    for own in parameters:
        traffic += communication.data_parallel_traffic(own, layout, config.training.precision, pipeline_rank, num_optimizers)
    traffic += communication.replicated_gradient_traffic(of_rank, layout)
    traffic += communication.copied_gradient_traffic(of_rank, layout)
    return communication.merged(traffic)
