"""The cheapest recomputation that a device's memory allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from w1train.config.rules.validate import validate
from w1train.config.schema import Config
from w1train.planning.plan_prediction import RECOMPUTE_CHOICES, Plan, predict


def suggest_recomputation(plan: Plan) -> Plan | None:
    """Return the plan of the same run with the fastest recomputation that fits; None if no recomputation fits.

    Groups of layers of every size cost the same time, so the plan with the least memory is taken among equally fast plans.
    """
    world_size = plan.layout.world_size
    fitting = [
        other
        for config in _choices(plan.run)
        if not validate(config, world_size)
        and (other := predict(config, world_size, plan.device, plan.assumptions, plan.document_length, plan.weights)).fits
    ]
    return min(fitting, key=lambda other: (other.step_seconds, other.needed_bytes), default=None)


def _choices(config: Config) -> Iterator[Config]:
    """Yield the run with each recomputation. Larger groups of layers keep fewer inputs, and hold more recomputed layers at once."""
    for choice in RECOMPUTE_CHOICES:
        for size in range(1, config.model.num_layers + 1) if choice == "full" else (config.parallel.recompute_num_layers,):
            parallel = dataclasses.replace(config.parallel, recompute=choice, recompute_num_layers=size)
            yield dataclasses.replace(config, parallel=parallel)
