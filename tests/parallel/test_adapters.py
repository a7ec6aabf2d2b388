"""Adapters in every layout: the single process's losses, gradients and parameters, and the base where the adapters are zero or off."""

import dataclasses

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.adapters import open_adapters
from tests.parallel.layouts import NUM_STEPS, open_gates, train_layout, train_layouts
from tests.parallel.test_layouts import assert_equal_numbers
from tests.slow import slow_except
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_experts
from w1train.config.schema_adapters import AdaptersConfig, is_adapter
from w1train.engine.building import build_trained_model
from w1train.inference.predictor import Predictor
from w1train.model.adapters import adapters_off
from w1train.runtime.distributed import distributed

SEQUENCE = {"tensor": 2, "sequence": True}
LAYOUTS = {
    "tp2": ([{"tensor": 2}, {"tensor": 2, "recompute": "full"}], 1),
    "tp2-sequence": ([SEQUENCE, {**SEQUENCE, "recompute": "full"}], 1),
    "pp2": ([{"pipeline": 2}], 1),
    "cp2": ([{"context": 2, "context_chunk_size": 4}], 1),
    "dp2": ([{}, {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}], 2),
    "tp2-pp2-vpp2": ([{**SEQUENCE, "pipeline": 2, "virtual_pipeline": 2}], 1),
    "tp2-cp2": ([{**SEQUENCE, "context": 2, "context_chunk_size": 4}], 1),
}
EXPERTS = tiny_experts()


def adapted_config(data_parallel=1, model=None, num_layers=2, **parallel):
    """Return a model with adapters on all linear layers; with a pipeline it has four layers and small micro-batches."""
    is_deep = num_layers > 2
    return tiny_config(
        model={"num_layers": num_layers, "qk_norm": True, "qkv_bias": True, **(model or {})},
        adapters={"rank": 3, "alpha": 6.0},
        parallel={"distributed_optimizer": False, **parallel},
        diffusion={"timestep_per": "document"},
        training={"global_batch_size": 8, "micro_batch_size": 2 if is_deep else 4 // data_parallel},
    )


def _assert_the_single_process(configs, data, expected):
    for outcome in train_layouts(configs, data, mutate=open_adapters):
        assert_equal_numbers(outcome, expected)
    moved = {name for name, gradient in expected.gradients.items() if gradient.abs().max() > 0}
    assert moved == {name for name in expected.gradients if is_adapter(name)}


@pytest.mark.parametrize("layout", slow_except(["tp2-sequence"], LAYOUTS))
def test_a_layout_gives_the_numbers_of_the_single_process(layout):
    layouts, data = LAYOUTS[layout]
    depth = {"num_layers": 4 if "pipeline" in layouts[0] else 2}
    expected = train_layout(adapted_config(**depth), mutate=open_adapters)
    _assert_the_single_process([adapted_config(data, **depth, **parallel) for parallel in layouts], data, expected)


@pytest.mark.slow
def test_shared_experts_have_adapters():
    """A mixture whose first layer is dense: the adapters of the MLP are in one layer, and those of the shared expert in the other."""
    expected = train_layout(adapted_config(model=EXPERTS), mutate=open_adapters)
    assert {name.split(".")[2] for name in expected.gradients if is_adapter(name) and ".shared_experts." in name} == {"1"}
    assert not any(is_adapter(name) for name in expected.gradients if ".mlp.experts." in name)
    _assert_the_single_process([adapted_config(model=EXPERTS, **SEQUENCE, expert=2)], 1, expected)


def _logits(config, model):
    tokens = torch.randint(VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(1))
    return Predictor(config, list(model.chunks))(tokens, torch.full((2,), 0.5))


def _zero_on_and_off(_rank, _size, config):
    """Return the logits of the base, of adapters that are zero, of adapters with values, and of these turned off."""
    with distributed(config.parallel):
        base_config = dataclasses.replace(config, adapters=AdaptersConfig())
        base, adapted = build_trained_model(base_config), build_trained_model(config)
        for model in (base, adapted):
            open_gates(model)
        found = [_logits(base_config, base), _logits(config, adapted)]
        open_adapters(adapted)
        found.append(_logits(config, adapted))
        with adapters_off(adapted.stages):
            found.append(_logits(config, adapted))
        return [*found, _logits(config, adapted)]


@pytest.mark.parametrize("parallel", slow_except([SEQUENCE], [{}, {"tensor": 2}, SEQUENCE, {"pipeline": 2}]), ids=str)
def test_adapters_that_are_zero_or_off_are_the_base_bit_for_bit(parallel):
    config = adapted_config(**parallel)
    size = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    base, zero, on, off, again = run_distributed(_zero_on_and_off, size, config, process_group=False)[0]
    assert torch.equal(zero, base)
    assert torch.equal(off, base)
    assert not torch.allclose(on, base, atol=1e-2)
    assert torch.equal(again, on)


def test_a_checkpoint_goes_on_in_its_layout_bit_for_bit_and_in_another(tmp_path):
    options = {"distributed_optimizer": True}
    config = adapted_config(**SEQUENCE, **options)
    straight = train_layout(config, num_steps=NUM_STEPS + 1)
    train_layout(config, save=tmp_path)
    path = tmp_path / f"step_{NUM_STEPS:010d}"
    resumed = train_layout(config, load=path, num_steps=1)
    assert resumed.losses == straight.losses[NUM_STEPS:]
    assert all(torch.equal(parameter, straight.parameters[name]) for name, parameter in resumed.parameters.items())
    moved = train_layout(adapted_config(2, **options), 2, load=path, num_steps=1)
    assert moved.losses == pytest.approx(straight.losses[NUM_STEPS:], rel=1e-6)
    assert moved.gradient_norms == pytest.approx(straight.gradient_norms[NUM_STEPS:], rel=1e-5)
