"""The search for the fastest layout: every layout worth trying is planned."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from w1train.config.rules.validate import validate
from w1train.config.schema import Config
from w1train.config.schema_model import ParallelConfig
from w1train.planning.assumptions import Assumptions, Device
from w1train.planning.layout import Recompute, layout_of
from w1train.planning.plan_prediction import RECOMPUTE_CHOICES, Plan, Planner, with_recompute, works_of
from w1train.planning.stage_weights import StageWeights, weights_of

_VIRTUAL = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The layouts that were tried, and the plans of those that fit."""

    num_tried: int
    num_valid: int
    plans: list[Plan]
    """Plans that fit, the fastest first."""


def search_layouts(
    config: Config,
    world_size: int,
    device: Device,
    assumptions: Assumptions,
    document_length: int | None = None,
    watched: Callable[[Sequence[ParallelConfig]], Iterable[ParallelConfig]] = iter,
) -> SearchResult:
    """Plan every combination of tensor, sequence, context, expert and pipeline parallelism (layers split evenly), micro-batch and
    recomputation that ``validate`` passes.

    Tensor and context parallelism stay within a node, where they have NVLink. Experts may be on several nodes. The global batch stays that
    of the recipe, so that every layout trains the same. A larger micro-batch never needs less memory. Therefore no larger one is planned
    where a micro-batch fits under no recomputation.

    Args:
        watched: a function that yields the layouts that it gets, and may show how many of them are done.
    """
    num_tried = num_valid = 0
    plans: list[Plan] = []
    planner = Planner(world_size, device, assumptions, document_length, works_of(config, document_length))
    known: dict[tuple[int, ...], list[StageWeights]] = {}
    for parallel in watched(list(_layouts(config, world_size, device.devices_per_node))):
        for micro_batch in _micro_batches(config, parallel, world_size):
            candidates = [_candidate(config, parallel, micro_batch, recompute) for recompute in RECOMPUTE_CHOICES]
            num_tried += len(candidates)
            if validate(candidates[0], world_size):
                continue
            num_valid += len(candidates)
            key = _weights_key(parallel)
            if key not in known:
                known[key] = weights_of(config, layout_of(candidates[0], world_size))
            weights = known[key]
            if not planner.can_fit(weights):
                break
            planned = [planner.plan_if_fits(candidate, weights) for candidate in candidates]
            fitting = [plan for plan in planned if plan is not None]
            plans += fitting
            if not fitting:
                break
    plans.sort(key=lambda plan: -plan.mfu)
    return SearchResult(num_tried, num_valid, plans)


def _weights_key(parallel: ParallelConfig) -> tuple[int, ...]:
    """Return what decides the weights of the ranks, among the fields that the search changes. Context- and data-parallel ranks share the
    optimizer's states together."""
    sizes = (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.expert, parallel.expert_tensor)
    return (*sizes, int(parallel.sequence))


def _candidate(config: Config, parallel: ParallelConfig, micro_batch: int, recompute: Recompute) -> Config:
    return dataclasses.replace(
        config,
        parallel=with_recompute(parallel, recompute, 1),
        training=dataclasses.replace(config.training, micro_batch_size=micro_batch),
    )


def _layouts(config: Config, world_size: int, devices_per_node: int) -> Iterator[ParallelConfig]:
    """Yield layouts without a choice of recomputation."""
    in_node = [size for size in _powers_of_two(devices_per_node) if world_size % size == 0]
    pipelines = [size for size in range(1, config.model.num_layers + 1) if world_size % size == 0]
    for tensor, context, pipeline, virtual in itertools.product(in_node, in_node, pipelines, _VIRTUAL):
        if tensor * context > devices_per_node or world_size % (tensor * context * pipeline) or (pipeline == 1 and virtual > 1):
            continue
        if config.model.num_layers % (pipeline * virtual):
            continue
        for expert, expert_tensor in _expert_sizes(config, world_size // pipeline, tensor):
            for sequence in _sequence(config, tensor):
                yield dataclasses.replace(
                    config.parallel,
                    tensor=tensor,
                    sequence=sequence,
                    context=context,
                    pipeline=pipeline,
                    virtual_pipeline=virtual,
                    expert=expert,
                    expert_tensor=expert_tensor,
                    num_layers_in_first_stage=None,
                    num_layers_in_last_stage=None,
                    embedding_counts_as_layer=False,
                    head_counts_as_layer=False,
                )


def _expert_sizes(config: Config, stage_size: int, tensor: int) -> Iterator[tuple[int, int]]:
    """Yield the numbers of expert-parallel and of expert-tensor-parallel ranks, which the ranks of a pipeline stage can be divided into.
    Each expert is on one rank, or on as many ranks as the other matrices."""
    num_experts = config.model.experts.num_experts
    for expert in _powers_of_two(min(num_experts, stage_size)) if num_experts else [1]:
        for expert_tensor in sorted({1, tensor}) if num_experts else [1]:
            if num_experts % expert == 0 and stage_size % (expert * expert_tensor) == 0:
                yield expert, expert_tensor


def _sequence(config: Config, tensor: int) -> tuple[bool, ...]:
    """Return whether to try sequence parallelism, without which experts would get each token from every tensor-parallel rank."""
    if tensor == 1:
        return (False,)
    return (True,) if config.model.experts.num_experts else (False, True)


def _micro_batches(config: Config, parallel: ParallelConfig, world_size: int) -> list[int]:
    """Return the powers of two that divide a data-parallel rank's part of the batch, the smallest first."""
    data = world_size // (parallel.tensor * parallel.context * parallel.pipeline)
    batch = config.training.global_batch_size
    return [size for size in _powers_of_two(batch // data) if batch % (size * data) == 0]


def _powers_of_two(largest: int) -> list[int]:
    return [1 << exponent for exponent in range(largest.bit_length()) if 1 << exponent <= largest]
