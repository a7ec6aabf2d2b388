"""A checkpoint of a mixture of experts loads under any other layout, with both optimizers and the balancing bias."""

from fnmatch import fnmatch
from functools import cache

import pytest
import torch

from tests.parallel.expert_models import expert_config, unbalance
from tests.parallel.layouts import train_layout
from tests.slow import slow_except
from w1train.engine import buckets

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


NAMES = list(LAYOUTS)
# All pairs for one kind; for the other kinds, each layout to the next layout and to the single process.
PAIRS = [
    (kind, first, second)
    for kind in KINDS
    for number, first in enumerate(NAMES)
    for second in (NAMES if kind == "slices" else dict.fromkeys([NAMES[(number + 1) % len(NAMES)], "single"]))
]
KEPT = [("slices", "tp2-ep2", "dp4-ep2")]


@pytest.mark.parametrize("pair", slow_except(KEPT, PAIRS), ids=str)
def test_next_step_is_the_uninterrupted_one(pair, saved):
    kind, first, second = pair
    outcome = train_layout(*_config(second, kind), num_steps=1, load=saved(first, kind))
    expected = _uninterrupted(KINDS[kind][1])
    assert outcome.losses == pytest.approx(expected.losses[NUM_STEPS:], rel=1e-6)
    assert outcome.gradient_norms == pytest.approx(expected.gradient_norms[NUM_STEPS:], rel=1e-5)
    for name, parameter in expected.parameters.items():
        assert (outcome.parameters[name] - parameter).abs().max() < 1e-5, name


FROZEN = [
    {"*.mlp.experts.*": 0.0},
    {"decoder.layers.2.mlp.experts.*": 0.0, "*.mlp.router.*": 0.0},
    {"*.mlp.experts.linear_fc1.*": 0.0, "*.mlp.experts.*": 0.3, "*.self_attention.*": 0.0},
]


@pytest.mark.parametrize("rates", slow_except([], FROZEN), ids=str)
@pytest.mark.parametrize("distributed_optimizer", slow_except([True], [True, False]))
def test_frozen_experts_and_rates_of_their_own(rates, distributed_optimizer, tmp_path):
    """If all experts are frozen, there is no optimizer of experts."""

    def config(**parallel):
        made = expert_config(1, distributed_optimizer=distributed_optimizer, **parallel)
        made.optimizer.rate_multipliers = rates
        return made

    straight = train_layout(config(), mutate=unbalance, num_steps=2)
    start = train_layout(config(expert=2), 2, mutate=unbalance, save=tmp_path, num_steps=1).parameters
    after = train_layout(config(pipeline=2), load=tmp_path / "step_0000000001", num_steps=1)
    assert after.losses == pytest.approx(straight.losses[1:], rel=1e-6)
    for name, parameter in straight.parameters.items():
        assert (after.parameters[name] - parameter).abs().max() < 1e-5, name
        rate = next((rate for pattern, rate in rates.items() if fnmatch(name, pattern)), 1.0)
        assert rate > 0 or torch.equal(after.parameters[name], start[name]), name


@pytest.mark.slow
def test_checkpoint_of_buckets_in_flight(tmp_path, monkeypatch):
    """Slices of experts are cut at the borders of several buckets, and no forward pass has gathered the parameters."""
    monkeypatch.setattr(buckets, "MIN_BUCKET_SIZE", 4000)
    monkeypatch.setattr(buckets, "MIN_BUCKET_SIZE_PER_RANK", 1)
    overlapped = expert_config(1, expert=2, overlap_grad_reduce=True, overlap_param_gather=True)
    train_layout(overlapped, 4, mutate=unbalance, num_steps=NUM_STEPS, save=tmp_path)
    path = tmp_path / f"step_{NUM_STEPS:010d}"
    expected = _uninterrupted(1)
    for config, data in ((expert_config(), 1), (overlapped, 4)):
        outcome = train_layout(config, data, num_steps=1, load=path)
        assert outcome.losses == pytest.approx(expected.losses[NUM_STEPS:], rel=1e-6)
        for name, parameter in expected.parameters.items():
            assert (outcome.parameters[name] - parameter).abs().max() < 1e-5, name
