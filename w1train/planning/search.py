"""The search for the fastest layout: every layout worth trying is planned."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from w1train.config.rules.validate import validate
from w1train.config.schema import Config
from w1train.planning.assumptions import Assumptions, Device
from w1train.planning.plan_prediction import RECOMPUTE_CHOICES, Plan, predict

_VIRTUAL = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The layouts that were tried, and the plans of those that fit."""

    num_tried: int
    num_valid: int
    plans: list[Plan]
    """Plans that fit, the fastest first."""


def search_layouts(
    config: Config, world_size: int, device: Device, assumptions: Assumptions, document_length: int | None = None
) -> SearchResult:
    """Plan every combination of tensor, sequence, context and pipeline parallelism (layers split evenly), micro-batch and recomputation
    that ``validate`` passes.

    Tensor and context parallelism stay within a node, where they have NVLink. The global batch stays that of the recipe, so that every
    layout trains the same.
    """
    num_tried = num_valid = 0
    plans = []
    for candidate in _candidates(config, world_size, device.devices_per_node):
        num_tried += 1
        if validate(candidate, world_size):
            continue
        num_valid += 1
        plan = predict(candidate, world_size, device, assumptions, document_length)
        if plan.fits:
            plans.append(plan)
    plans.sort(key=lambda plan: -plan.mfu)
    return SearchResult(num_tried, num_valid, plans)


def _candidates(config: Config, world_size: int, devices_per_node: int) -> Iterator[Config]:
    in_node = [size for size in _powers_of_two(devices_per_node) if world_size % size == 0]
    pipelines = [size for size in range(1, config.model.num_layers + 1) if world_size % size == 0]
    micro_batches = _powers_of_two(config.training.global_batch_size)
    choices = itertools.product(in_node, in_node, pipelines, _VIRTUAL, micro_batches, RECOMPUTE_CHOICES)
    for tensor, context, pipeline, virtual, micro_batch, recompute in choices:
        if tensor * context > devices_per_node or (pipeline == 1 and virtual > 1):
            continue
        for sequence in (False, True) if tensor > 1 else (False,):
            parallel = dataclasses.replace(
                config.parallel,
                tensor=tensor,
                sequence=sequence,
                context=context,
                pipeline=pipeline,
                virtual_pipeline=virtual,
                num_layers_in_first_stage=None,
                num_layers_in_last_stage=None,
                embedding_counts_as_layer=False,
                head_counts_as_layer=False,
                recompute=recompute,
                recompute_num_layers=1,
            )
            training = dataclasses.replace(config.training, micro_batch_size=micro_batch)
            yield dataclasses.replace(config, parallel=parallel, training=training)


def _powers_of_two(largest: int) -> list[int]:
    return [1 << exponent for exponent in range(largest.bit_length()) if 1 << exponent <= largest]
