"""Updates of the product in every layout, against torch's AdamW and clipping on the whole model of a single process.

AdamW hides a gradient's scale if epsilon is small, so epsilon is here as large as the gradients. Layouts that agree with one another
cannot show a wrong beta, decay or clipping, because all of them have the same settings.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.layouts import micro_batches, open_gates, whole_tensors, world_size
from tests.parallel.test_layouts import layout_config
from tests.tiny import packed_batch
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.config.schema import Config  # noqa: E402
from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine.building import build_trained_model  # noqa: E402
from w1train.engine.gradients import prepare_gradients, step_with_prepared_gradients  # noqa: E402
from w1train.model.initialization import global_named_parameters  # noqa: E402
from w1train.runtime.distributed import Ranks, distributed  # noqa: E402
from w1train.training.forward import run_micro_batches  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402

NUM_STEPS, RATE = 3, 0.03
CLIPS = (0.0, 0.3, 0.85)
"""No clipping, a norm below those of all steps, and a norm between those of the steps."""
OPTIMIZER = {"beta1": 0.8, "beta2": 0.97, "epsilon": 1e-2, "weight_decay": 0.7}

Parameters = dict[str, torch.Tensor]


def _config(clip: float, data_parallel: int = 1, **parallel) -> Config:
    config = layout_config("one-stream", data_parallel, num_layers=2, **parallel)
    config.optimizer = dataclasses.replace(config.optimizer, **OPTIMIZER, clip_grad=clip)
    return config


def _gradients(stage: torch.nn.Module, config: Config, step: int) -> list[torch.Tensor]:
    """Of the loss over the global batch, in one graph: nothing of the training path but the model."""
    size = config.training.global_batch_size
    batch = packed_batch(range(step * size, (step + 1) * size), config.data.sequence_length)
    noisy = corrupt(batch, config.diffusion, config.training.seed)
    logits = stage(rank_inputs(noisy, config).model)
    losses = torch.nn.functional.cross_entropy(logits, noisy.targets[noisy.loss_mask], reduction="none")
    loss = (losses / noisy.target_timesteps[noisy.loss_mask]).sum() / noisy.num_tokens
    return list(torch.autograd.grad(loss, list(stage.parameters())))


def _by_torch(config: Config) -> tuple[Parameters, Parameters, list[float]]:
    """(parameters at first, parameters after the last step, norm of each step's gradients before clipping)"""
    model = build_trained_model(config)
    open_gates(model)
    stage, settings = model.stages[0], config.optimizer
    named = list(global_named_parameters(stage))
    start = {name: parameter.detach().clone() for name, parameter in named}
    parameters = [parameter for _, parameter in named]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)
    norms = []
    for step in range(NUM_STEPS):
        for parameter, gradient in zip(stage.parameters(), _gradients(stage, config, step), strict=True):
            parameter.grad = gradient
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad or float("inf"))))
        optimizer.step()
    return start, {name: parameter.detach() for name, parameter in named}, norms


def _all_by_torch(_rank: int, _size: int, configs: list[Config]) -> list[tuple[Parameters, Parameters, list[float]]]:
    with distributed(configs[0].parallel):
        return [_by_torch(config) for config in configs]


@pytest.fixture(scope="module")
def expected() -> list[tuple[Parameters, Parameters, list[float]]]:
    configs = [_config(clip, distributed_optimizer=False) for clip in CLIPS]
    return run_distributed(_all_by_torch, 1, configs, process_group=False)[0]


def _by_the_product(config: Config, ranks: Ranks) -> Parameters:
    """What ``Trainer.train_step`` calls, step by step."""
    model = build_trained_model(config)
    open_gates(model)
    for step in range(NUM_STEPS):
        batches = list(micro_batches(config, step, ranks.data_parallel_rank, ranks.data_parallel_size))
        model.zero_gradients()
        run_micro_batches(config, list(model.chunks), iter(batches), len(batches), training=True)
        for group in model.optimizer.param_groups:
            group["lr"] = RATE * group["lr_mult"]
        step_with_prepared_gradients(model.optimizer, prepare_gradients(model.optimizer))
    model.gather_parameters()
    return whole_tensors(model, lambda parameter: parameter.data)


def _all_by_the_product(_rank: int, _size: int, configs: list[Config]) -> list[Parameters]:
    with distributed(configs[0].parallel) as ranks:
        return [_by_the_product(config, ranks) for config in configs]


def _distance(found: Parameters, wanted: Parameters, start: Parameters) -> float:
    """The largest relative error of what the updates changed, over the parameters."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / (wanted[name] - start[name]).norm()) for name in wanted)


TOLERANCE = 1e-3
"""A norm's weight is near 1 and changes by 1e-4, of which float32 rounds a thousandth."""


@pytest.mark.parametrize(
    ("parallel", "data_parallel"),
    [
        pytest.param({"distributed_optimizer": False}, 1, marks=pytest.mark.slow),
        pytest.param({"tensor": 2}, 1, marks=pytest.mark.slow),
        ({"tensor": 2, "sequence": True}, 1),
        pytest.param({"pipeline": 2}, 1, marks=pytest.mark.slow),
        pytest.param({"context": 2}, 1, marks=pytest.mark.slow),
        ({}, 2),
    ],
    ids=str,
)
def test_updates_are_torchs(parallel, data_parallel, expected):
    configs = [_config(clip, data_parallel, **parallel) for clip in CLIPS]
    found = run_distributed(_all_by_the_product, world_size(configs[0], data_parallel), configs, process_group=False)[0]
    for clip, parameters, (start, wanted, _) in zip(CLIPS, found, expected, strict=True):
        assert _distance(parameters, wanted, start) <= TOLERANCE, f"clip_grad={clip}"


def test_norms_are_clipped_at_some_steps(expected):
    never, always, sometimes = (sum(norm > clip > 0 for norm in norms) for clip, (*_, norms) in zip(CLIPS, expected, strict=True))
    assert (never, always) == (0, NUM_STEPS)
    assert 0 < sometimes < NUM_STEPS


def test_another_setting_shows(expected):
    """The comparison would notice a setting that is not used as it is meant."""
    start, wanted, _ = expected[1]
    changes = [{"clip_grad": 2 * CLIPS[1]}, {"beta2": OPTIMIZER["beta1"]}, {"beta1": OPTIMIZER["beta2"]}, {"weight_decay": 0.6}]
    configs = [_config(CLIPS[1], distributed_optimizer=False) for _ in changes]
    for config, change in zip(configs, changes, strict=True):
        config.optimizer = dataclasses.replace(config.optimizer, **change)
    (others,) = run_distributed(_all_by_torch, 1, configs, process_group=False)
    for change, (_, other, _) in zip(changes, others, strict=True):
        assert _distance(other, wanted, start) > 10 * TOLERANCE, change
