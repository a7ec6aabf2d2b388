"""Learning rates by parameter: multiples of the schedule's, and 0 for what is frozen."""

from __future__ import annotations

import fnmatch
import logging

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from w1train.config.errors import ConfigurationError, Problem, listing
from w1train.model.initialization import global_named_parameters

logger = logging.getLogger(__name__)

_KEY = "optimizer.rate_multipliers"
_MOST_NAMES = 20


def freeze_and_mark(stages: list[torch.nn.Module], multipliers: dict[str, float]) -> None:
    """Give each parameter its ``rate_multiplier``; one of 0 needs no gradient. Before the data-parallel wrapper, which counts gradients.

    Raises:
        ConfigurationError: on every rank, for a pattern that fits no parameter of the model.
    """
    names: set[str] = set()
    for stage in stages:
        for name, parameter in global_named_parameters(stage):
            names.add(name)
            parameter.rate_multiplier = _multiplier(name, multipliers)
            if parameter.rate_multiplier == 0:
                parameter.requires_grad_(False)
    if multipliers:
        _require_matches(names, multipliers)


def rate_overrides(stages: list[torch.nn.Module]) -> dict[ParamKey, dict[str, float]]:
    """For megatron-core's optimizer: a parameter group for each multiplier, whose ``lr_mult`` it becomes."""
    found = {parameter.rate_multiplier for stage in stages for parameter in stage.parameters() if parameter.requires_grad}
    return {
        ParamKey(predicate=ParamPredicate(f"rate x {multiplier}", lambda parameter, rate=multiplier: parameter.rate_multiplier == rate)): {
            "lr_mult": multiplier
        }
        for multiplier in sorted(found - {1.0})
    }


def _multiplier(name: str, multipliers: dict[str, float]) -> float:
    return next((multiplier for pattern, multiplier in multipliers.items() if fnmatch.fnmatchcase(name, pattern)), 1.0)


def _require_matches(names: set[str], multipliers: dict[str, float]) -> None:
    # A stage has only its own layers.
    everywhere: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everywhere, names)
    all_names = sorted(set().union(*everywhere))
    unused = [pattern for pattern in multipliers if not fnmatch.filter(all_names, pattern)]
    if unused:
        shown = listing([*all_names[:_MOST_NAMES], "..."])
        found = "a pattern that fits no parameter"
        raise ConfigurationError([Problem(f"{_KEY}.{pattern}", found, f"one that does: {shown}") for pattern in unused])
    num_frozen = sum(_multiplier(name, multipliers) == 0 for name in all_names)
    logger.info("%d of %d parameter tensors are frozen", num_frozen, len(all_names))
