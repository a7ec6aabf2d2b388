"""The layouts near a given one that are suggested: the cheapest recomputation that a device's memory allows, and the fastest expert
parallelism inside a node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from w1train.config.rules.divisibility import does_not_divide
from w1train.config.rules.validate import validate
from w1train.config.schema import Config
from w1train.planning.layout import layout_of
from w1train.planning.plan_prediction import RECOMPUTE_CHOICES, Plan, Planner, with_recompute, works_of
from w1train.planning.stage_weights import StageWeights, weights_of


def suggest_recomputation(plan: Plan) -> Plan | None:
    """Return the plan of the same run with the fastest recomputation that fits; None if no recomputation fits.

    Groups of layers of every size cost the same time, so the plan with the least memory is taken among equally fast plans.
    """
    return _fastest(plan, _recomputations(plan.run), lambda _: plan.weights)


def suggest_expert_parallelism(plan: Plan) -> Plan | None:
    """Return the plan of the same run with the fastest expert parallelism whose ranks are inside a node, and that fits; None if no such
    plan fits. Each expert stays on as many ranks as it was."""
    return _fastest(plan, _expert_parallelisms(plan), lambda config: weights_of(config, layout_of(config, plan.layout.world_size)))


def num_nodes_of_experts(plan: Plan) -> int:
    """Return the nodes over which the expert-parallel ranks of a group are spread."""
    return -(-plan.layout.num_expert_slices // plan.device.devices_per_node)


def _fastest(plan: Plan, choices: Iterator[Config], weights: Callable[[Config], list[StageWeights]]) -> Plan | None:
    """Return the fastest plan that fits, among the choices that are valid.

    Args:
        weights: the function that returns the weights of a choice.
    """
    world_size, run = plan.layout.world_size, plan.run
    planner = Planner(world_size, plan.device, plan.assumptions, plan.document_length, works_of(run, plan.document_length))
    plans = (planner.plan_if_fits(config, weights(config)) for config in choices if not validate(config, world_size))
    fitting = [other for other in plans if other is not None]
    return min(fitting, key=lambda other: (other.step_seconds, other.needed_bytes), default=None)


def _recomputations(config: Config) -> Iterator[Config]:
    """Yield the run with each recomputation. Larger groups of layers keep fewer inputs, and hold more recomputed layers at once."""
    for choice in RECOMPUTE_CHOICES:
        for size in range(1, config.model.num_layers + 1) if choice == "full" else (config.parallel.recompute_num_layers,):
            yield dataclasses.replace(config, parallel=with_recompute(config.parallel, choice, size))


def _expert_parallelisms(plan: Plan) -> Iterator[Config]:
    """Yield the run with each number of expert-parallel ranks that a node has and that divides the experts."""
    config, num_experts = plan.run, plan.run.model.experts.num_experts
    for expert in range(1, plan.device.devices_per_node // plan.layout.expert_tensor + 1):
        if not does_not_divide(expert, num_experts):
            yield dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, expert=expert))
