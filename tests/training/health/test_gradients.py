"""The step that is judged first is megatron-core's own, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from tests.distributed import run_distributed
from tests.slow import slow_except
from tests.tiny import packed_batch, tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.config.schema import Config  # noqa: E402
from w1train.config.schema_model import ExpertsConfig  # noqa: E402
from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine.building import TrainedModel, build_trained_model  # noqa: E402
from w1train.engine.gradients import (  # noqa: E402
    LocalGradients,
    nonfinite_parameters,
    prepare_gradients,
    step_with_prepared_gradients,
)
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.forward import run_micro_batches  # noqa: E402


def compute(model: TrainedModel, config: Config, rank: int, num_ranks: int, step: int) -> None:
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    model.optimizer.zero_grad()
    each = config.training.global_batch_size // num_ranks
    first = step * config.training.global_batch_size + rank * each
    size = config.training.micro_batch_size
    batches = [corrupt(packed_batch(range(start, start + size)), config.diffusion, seed=0) for start in range(first, first + each, size)]
    run_micro_batches(config, list(model.chunks), iter(batches), len(batches), training=True)


def train(config: Config, num_ranks: int, rank: int, ready: bool) -> list:
    """Return norms and weights after three steps."""
    model = build_trained_model(config)
    norms = []
    for step in range(3):
        compute(model, config, rank, num_ranks, step)
        for group in model.optimizer.param_groups:
            group["lr"] = 1e-2
        if ready:
            norm = prepare_gradients(model.optimizer)
            step_with_prepared_gradients(model.optimizer, norm)
        else:
            _, norm, _ = model.optimizer.step()
        norms.append(float(norm))
    model.gather_parameters()
    return [norms, [parameter.detach().float().clone() for stage in model.stages for parameter in stage.parameters()]]


def train_both_ways(_rank: int, _world_size: int, cases: dict[str, dict]) -> dict[str, list]:
    """Return, for each case, what the whole step gives and what the step in two parts gives. The cases have the same process groups."""
    configs = {name: tiny_config(**sections) for name, sections in cases.items()}
    with distributed(next(iter(configs.values())).parallel) as ranks:
        place = ranks.data_parallel_size, ranks.data_parallel_rank
        return {name: [train(config, *place, ready) for ready in (False, True)] for name, config in configs.items()}


# Two ranks share the experts, which have an optimizer of their own.
EXPERTS: dict[str, dict] = {
    "model": {"experts": ExpertsConfig(num_experts=4, num_active=2, ffn_hidden_size=16)},
    "parallel": {"expert": 2},
}
LAYOUTS: dict[str, dict[str, dict]] = {
    "data": {
        "fp32": {},
        "bf16": {"training": {"precision": "bf16"}},
        "without the distributed optimizer": {"parallel": {"distributed_optimizer": False}},
        "overlap": {
            "training": {"precision": "bf16"},
            "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True},
        },
        "hardly clipped": {"optimizer": {"clip_grad": 1e9}},
        "not clipped": {"optimizer": {"clip_grad": 0.0}},
        "all clipped": {"optimizer": {"clip_grad": 1e-3}},
    },
    "tensor": {"tensor": {"parallel": {"tensor": 2}}},
    "pipeline": {"pipeline": {"parallel": {"pipeline": 2}}},
    "experts": {
        "all clipped": {**EXPERTS, "optimizer": {"clip_grad": 1e-3}},
        "without the distributed optimizer": {**EXPERTS, "parallel": {"expert": 2, "distributed_optimizer": False}},
        "overlap": {**EXPERTS, "parallel": {"expert": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}},
    },
}


@pytest.mark.parametrize("layout", slow_except(["data"], LAYOUTS))
def test_a_step_in_two_parts_is_the_whole_step(layout):
    for results in run_distributed(train_both_ways, 2, LAYOUTS[layout]):
        for name, (whole, parts) in results.items():
            assert whole[0] == parts[0], name
            assert all(torch.equal(a, b) for a, b in zip(whole[1], parts[1], strict=True)), name


LAST = "decoder.layers.1.mlp.linear_fc2.weight"


def find_nonfinite(rank: int, world_size: int, sections: dict, name: str) -> tuple[list[str], list[str], list[str], bool, bool]:
    """A gradient of rank 1 becomes infinite."""
    config = tiny_config(**sections)
    with distributed(config.parallel) as ranks:
        model = build_trained_model(config)
        local = LocalGradients(model.hooks)
        place = ranks.data_parallel_rank, ranks.data_parallel_size
        local.begin()
        compute(model, config, *place, 0)
        before = local.nonfinite_ranks()
        assert local.are_finite()
        parameter = dict(model.stages[0].named_parameters())[name]
        factor = float("inf") if rank == 1 else 1.0
        hook = parameter.register_hook(lambda gradient: gradient * factor)
        local.begin()
        compute(model, config, *place, 1)
        found = local.nonfinite_ranks(), nonfinite_parameters(model.chunks)
        result = before, *found, local.are_finite(), math.isfinite(prepare_gradients(model.optimizer))
        hook.remove()
        local.begin()
        compute(model, config, *place, 2)
        assert local.are_finite(), "a bad step says nothing of the next one"
        return result


@pytest.mark.parametrize(
    ("sections", "last"),
    [
        ({}, LAST),
        ({"parallel": {"overlap_grad_reduce": True}}, LAST),
        ({"parallel": {"distributed_optimizer": False}}, LAST),
        (EXPERTS, LAST.replace("mlp", "mlp.experts")),
    ],
)
def test_the_rank_of_a_nonfinite_gradient_is_known_and_its_parameter(sections, last):
    results = run_distributed(find_nonfinite, 2, sections, last)
    for before, ranks, _, are_finite, norm_is_finite in results:
        assert before == []
        assert [name.split(" on ")[0] for name in ranks] == ["rank 1"]
        assert not are_finite
        assert not norm_is_finite
    assert {name for result in results for name in result[2]} == {last}


def test_a_gradient_that_the_norm_leaves_out_is_seen():
    """Tensor-parallel ranks hold the timestep embedding alike, and the norm counts the first one's."""
    name = "timestep_embedding.linear_out.weight"
    results = run_distributed(find_nonfinite, 2, {"parallel": {"tensor": 2}}, name)
    assert [(result[3], result[4]) for result in results] == [(False, True)] * 2, "(gradients, their norm)"
    assert [result[2] for result in results] == [[], [name]]
