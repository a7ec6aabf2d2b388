"""Every layout worth trying, judged by the plan."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from w1train.config.schema import Config
from w1train.config.validate import validate
from w1train.planning.assumptions import Assumptions, Device
from w1train.planning.prediction import RECOMPUTE_CHOICES, Plan, predict


@dataclass(frozen=True, slots=True)
class SearchResult:
    """All valid layouts."""

    num_tried: int
    num_valid: int
    plans: list[Plan]
    """Those that fit, fastest first."""


def search_layouts(
    config: Config, world_size: int, device: Device, assumptions: Assumptions, document_length: int | None = None
) -> SearchResult:
    """Plan every combination of tensor, sequence and pipeline parallelism, micro-batch and recomputation that ``validate`` passes.

    Tensor parallelism stays within a node, where it has NVLink. The global batch, and with it what is trained, is the recipe's.
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
    tensors = [size for size in _powers_of_two(devices_per_node) if world_size % size == 0]
    pipelines = [size for size in range(1, config.model.num_layers + 1) if world_size % size == 0]
    micro_batches = _powers_of_two(config.training.global_batch_size)
    for tensor, pipeline, micro_batch, recompute in itertools.product(tensors, pipelines, micro_batches, RECOMPUTE_CHOICES):
        for sequence in (False, True) if tensor > 1 else (False,):
            parallel = dataclasses.replace(
                config.parallel, tensor=tensor, sequence=sequence, pipeline=pipeline, recompute=recompute, recompute_num_layers=1
            )
            training = dataclasses.replace(config.training, micro_batch_size=micro_batch)
            yield dataclasses.replace(config, parallel=parallel, training=training)


def _powers_of_two(largest: int) -> list[int]:
    return [1 << exponent for exponent in range(largest.bit_length()) if 1 << exponent <= largest]
