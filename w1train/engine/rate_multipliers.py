"""Learning rates by parameter: multiples of the schedule's rate, and 0 for a frozen parameter."""

from __future__ import annotations

import fnmatch
import logging
import re

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from w1train.config.errors import Problem, listing, raise_if_any
from w1train.config.schema_adapters import AdaptersConfig, is_trained
from w1train.model.initialization import global_named_parameters

logger = logging.getLogger(__name__)

_KEY = "optimizer.rate_multipliers"
_MOST_NAMES = 20


def freeze_and_mark(stages: list[torch.nn.Module], multipliers: dict[str, float], adapters: AdaptersConfig) -> None:
    """Give each parameter its ``rate_multiplier``, and switch the gradient off where the multiplier is 0 in every layer. It is 0 for
    the base of a model with adapters. This is called before the data-parallel wrapper is made, because the wrapper counts the parameters
    that have gradients.

    Raises:
        ConfigurationError: on every rank; a pattern fits no parameter of the model, or every parameter is frozen.
    """
    named = [item for stage in stages for item in global_named_parameters(stage)]
    names = _names_of_all_ranks({name for name, _ in named}) if multipliers or adapters.rank else [name for name, _ in named]
    _check(names, multipliers, adapters)
    # Checkpoints stack the parameters of one kind over the layers, with their optimizer states. A layer without states would leave a hole
    # in the stack. Where only some layers are frozen, they therefore keep states and gradients (which count in the norm), at a rate of 0.
    trained_kinds = {_kind(name) for name in names if _multiplier(name, multipliers, adapters) > 0}
    for name, parameter in named:
        parameter.rate_multiplier = _multiplier(name, multipliers, adapters)
        if _kind(name) not in trained_kinds:
            parameter.requires_grad_(False)


def rate_overrides(stages: list[torch.nn.Module]) -> dict[ParamKey, dict[str, float]]:
    """Return what makes megatron-core's optimizer put the parameters of each multiplier into a group with that ``lr_mult``."""
    found = {parameter.rate_multiplier for stage in stages for parameter in stage.parameters() if parameter.requires_grad}
    return {
        ParamKey(predicate=ParamPredicate(f"rate x {multiplier}", lambda parameter, rate=multiplier: parameter.rate_multiplier == rate)): {
            "lr_mult": multiplier
        }
        for multiplier in sorted(found - {1.0})
    }


def _multiplier(name: str, multipliers: dict[str, float], adapters: AdaptersConfig) -> float:
    if not is_trained(name, adapters):
        return 0.0
    return next((multiplier for pattern, multiplier in multipliers.items() if fnmatch.fnmatchcase(name, pattern)), 1.0)


def _kind(name: str) -> str:
    """Return the name without the number of its layer."""
    return re.sub(r"\blayers\.\d+\.", "layers.", name)


def _names_of_all_ranks(names: set[str]) -> list[str]:
    """Return the names on all ranks: a pipeline stage has only its own layers."""
    everywhere: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everywhere, names)
    return sorted(set().union(*everywhere))


def _check(names: list[str], multipliers: dict[str, float], adapters: AdaptersConfig) -> None:
    shown = listing([*names[:_MOST_NAMES], "..."])
    patterns = [(f"{_KEY}.{pattern}", pattern) for pattern in multipliers]
    patterns += [("adapters.train", pattern) for pattern in adapters.train if adapters.rank]
    problems = [
        Problem(key, f"{pattern}, a pattern that fits no parameter", f"a pattern that fits a parameter: {shown}")
        for key, pattern in patterns
        if not fnmatch.filter(names, pattern)
    ]
    num_frozen = sum(_multiplier(name, multipliers, adapters) == 0 for name in names)
    if num_frozen == len(names):
        problems.append(Problem(_KEY, "0 for every parameter", "a number above 0 for some: nothing would be trained"))
    raise_if_any(problems)
    if multipliers or adapters.rank:
        logger.info("%d of %d parameter tensors have a learning rate of 0", num_frozen, len(names))
