"""A checkpoint of a mixture of experts loads under any other layout, with both optimizers and the balancing bias."""

from functools import cache

import pytest

from tests.parallel.expert_models import expert_config, unbalance
from tests.parallel.layouts import train_layout
from tests.slow import slow_except

NUM_STEPS = 2
"""Steps before the save. One step follows."""
# Layout and data-parallel ranks.
LAYOUTS = {
    "single": ({}, 1),
    "dp2": ({}, 2),
    "ep2": ({"expert": 2}, 2),
    "ep4": ({"expert": 4}, 4),
    "dp4-ep2": ({"expert": 2}, 4),
    "tp2": ({"tensor": 2, "sequence": True}, 1),
    "tp2-ep2": ({"tensor": 2, "sequence": True, "expert": 2}, 1),
    "tp2-etp2": ({"tensor": 2, "sequence": True, "expert_tensor": 2}, 1),
    "tp2-etp2-dp2-ep2": ({"tensor": 2, "sequence": True, "expert_tensor": 2, "expert": 2}, 2),
    "cp2-ep2": ({"context": 2, "expert": 2}, 1),
    "pp2-vpp2-dp2-ep2": ({"pipeline": 2, "virtual_pipeline": 2, "expert": 2}, 2),
}
# The dense optimizer's slices are those of data-parallel ranks, and without dense layers a first stage has experts too.
KINDS = {"slices": (True, 1), "slices, all layers with experts": (True, 0), "whole, first stage dense": (False, 2)}


@cache
def _uninterrupted(num_dense_layers):
    config = expert_config(experts={"num_dense_layers": num_dense_layers}, distributed_optimizer=False)
    return train_layout(config, mutate=unbalance, num_steps=NUM_STEPS + 1)


def _config(name, kind):
    distributed_optimizer, num_dense_layers = KINDS[kind]
    parallel, data = LAYOUTS[name]
    experts = {"num_dense_layers": num_dense_layers}
    micro_batch_size = 2 if parallel.get("pipeline", 1) == 1 and data == 1 else 1
    return expert_config(micro_batch_size, experts, distributed_optimizer=distributed_optimizer, **parallel), data


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that returns the checkpoint of a layout, which it writes once."""
    directory = tmp_path_factory.mktemp("saved")

    @cache
    def checkpoint(name, kind):
        path = directory / kind / name
        train_layout(*_config(name, kind), mutate=unbalance, num_steps=NUM_STEPS, save=path)
        return path / f"step_{NUM_STEPS:010d}"

    return checkpoint


PAIRS = [(kind, first, second) for kind in KINDS for first in LAYOUTS for second in LAYOUTS]
KEPT = [("slices", "tp2-ep2", "single")]


@pytest.mark.parametrize("pair", slow_except(KEPT, PAIRS), ids=str)
def test_next_step_is_the_uninterrupted_one(pair, saved):
    kind, first, second = pair
    outcome = train_layout(*_config(second, kind), num_steps=1, load=saved(first, kind))
    expected = _uninterrupted(KINDS[kind][1])
    assert outcome.losses == pytest.approx(expected.losses[NUM_STEPS:], rel=1e-6)
    assert outcome.gradient_norms == pytest.approx(expected.gradient_norms[NUM_STEPS:], rel=1e-5)
    for name, parameter in expected.parameters.items():
        assert (outcome.parameters[name] - parameter).abs().max() < 1e-5, name
