"""Preferences have the single process's numbers in every layout and for every micro-batch size, and leave the reference alone."""

from __future__ import annotations

from functools import cache

import pytest

from tests.parallel.layouts import Outcome, train_layout, train_layouts
from tests.parallel.test_layouts import VIRTUAL, assert_equal_numbers
from tests.slow import slow_except
from tests.tiny import tiny_config
from w1train.config.schema import Config

CASES = {
    "chosen-shift": {"preference_cross_entropy_weight": 0.05, "shift": True, "antithetic": True},
    "blocks": {"block_size": 4, "complementary": True},
}
DRAWS = 2
NUM_STEPS = 2


def _config(name: str, micro_batch_size: int = 8, **parallel: object) -> Config:
    given = {
        "t_min": 0.01,
        "random_length_probability": 0.0,
        "preference_draws": DRAWS,
        "preference_beta": 0.3,
    }
    return tiny_config(
        model={"num_layers": 4 if "virtual_pipeline" in parallel else 2},
        parallel={"context_chunk_size": 4, "distributed_optimizer": False, **parallel},
        diffusion={**given, **CASES[name]},
        training={"global_batch_size": 8, "micro_batch_size": micro_batch_size},
        # The replies of a pair pull in opposite directions, so some gradients are hardly larger than rounding errors, and Adam would divide
        # such a gradient by itself.
        optimizer={"epsilon": 1e-3},
    )


@cache
def _single(num_layers: int) -> dict[str, Outcome]:
    configs = [_config(name) for name in CASES]
    for config in configs:
        config.model.num_layers = num_layers
    return dict(zip(CASES, train_layouts(configs, num_steps=NUM_STEPS), strict=True))


LAYOUTS = {
    "one-sample-a-micro-batch": ({}, 1, 1),
    "dp2": ({}, 2, 2),
    "tp2-cp2": ({"tensor": 2, "sequence": True, "context": 2}, 1, 4),
    "pp2": ({"pipeline": 2}, 1, 2),
    "cp2-dp2": ({"context": 2, "context_method": "all_to_all"}, 2, 1),
    "vpp2": ({**VIRTUAL}, 1, 1),
}


@pytest.mark.parametrize("layout", slow_except(("tp2-cp2",), LAYOUTS))
def test_every_layout_has_the_single_process_numbers(layout):
    parallel, data, micro_batch_size = LAYOUTS[layout]
    configs = [_config(name, micro_batch_size, **parallel) for name in CASES]
    single = _single(configs[0].model.num_layers)
    for name, outcome in zip(CASES, train_layouts(configs, data, num_steps=NUM_STEPS), strict=True):
        assert_equal_numbers(outcome, single[name], name)


def test_training_moves_the_loss_and_the_gradient_is_not_zero():
    """A comparison of layouts would not notice a gradient of zero."""
    outcome = _single(2)["blocks"]
    assert min(outcome.gradient_norms) > 1e-3
    assert len(set(outcome.losses)) == len(outcome.losses)


@pytest.mark.slow
def test_a_sharded_optimizer_that_overlaps_keeps_the_numbers():
    """Parameters are gathered by the first of three passes over the model."""
    overlapping = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    outcome = train_layout(_config("blocks", 2, **overlapping), 2, num_steps=NUM_STEPS)
    assert outcome.losses == pytest.approx(_single(2)["blocks"].losses, rel=1e-6)
