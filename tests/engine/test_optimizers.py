"""The optimizer is looked up by its name: another one is one function and its registration."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import run_distributed
from tests.tiny import packed_batch, tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.config.errors import ConfigurationError  # noqa: E402
from w1train.config.schema import Config  # noqa: E402
from w1train.config.schema_model import ExpertsConfig  # noqa: E402
from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine import optimizers  # noqa: E402
from w1train.engine.building import build_trained_model  # noqa: E402
from w1train.engine.gradients import prepare_gradients, step_with_prepared_gradients  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.forward import run_micro_batches  # noqa: E402

RATE, CLIP = 0.5, 0.125


def prepare_sgd(config: Config) -> dict[str, object]:
    """What a file of a new optimizer has: plain gradient descent."""
    return {"optimizer": "sgd", "sgd_momentum": 0.0}


def one_step(
    rank: int, world_size: int, experts: ExpertsConfig
) -> tuple[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]], float]:
    """(before, gradient, after, learning rate) of each parameter, and the norm of all gradients."""
    config = tiny_config(
        optimizer={"name": "sgd", "weight_decay": 0.0, "clip_grad": CLIP, "rate_multipliers": {"*.mlp.*": 2.0}},
        parallel={"distributed_optimizer": False, "expert": world_size},
        model={"experts": experts},
    )
    with distributed(config.parallel):
        model = build_trained_model(config)
        before = [parameter.detach().clone() for parameter in model.stages[0].parameters()]
        model.zero_gradients()
        batches = [corrupt(packed_batch(range(config.training.micro_batch_size)), config.diffusion, seed=0)]
        run_micro_batches(config, list(model.chunks), iter(batches), 1, training=True)
        gradients = [parameter.main_grad.clone() for parameter in model.stages[0].parameters()]
        for group in model.optimizer.param_groups:
            group["lr"] = RATE * group["lr_mult"]
        norm = prepare_gradients(model.optimizer)
        step_with_prepared_gradients(model.optimizer, norm)
        rates = [RATE * parameter.rate_multiplier for parameter in model.stages[0].parameters()]
        after = [parameter.detach() for parameter in model.stages[0].parameters()]
        return [*zip(before, gradients, after, rates, strict=True)], float(norm)


def assert_clipped(parameters: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]], norm: float) -> None:
    assert norm > CLIP
    assert {rate for *_, rate in parameters} == {RATE, 2 * RATE}
    for before, gradient, after, rate in parameters:
        torch.testing.assert_close(after, before - rate * (CLIP / norm) * gradient, rtol=1e-4, atol=1e-7)


def test_a_registered_optimizer_trains(monkeypatch):
    monkeypatch.setitem(optimizers.OPTIMIZERS, "sgd", prepare_sgd)
    ((parameters, norm),) = run_distributed(one_step, 1, ExpertsConfig())
    assert_clipped(parameters, norm)


def test_all_weights_are_clipped_by_one_norm_if_ranks_share_experts(monkeypatch):
    """Experts have an optimizer of their own. The norm counts each expert once, and other weights once for both ranks."""
    monkeypatch.setitem(optimizers.OPTIMIZERS, "sgd", prepare_sgd)
    experts = ExpertsConfig(num_experts=4, num_active=2, ffn_hidden_size=16, num_dense_layers=1)
    results = run_distributed(one_step, 2, experts)
    squares = 0.0
    for rank, (parameters, norm) in enumerate(results):
        assert_clipped(parameters, norm)
        # The matrices of experts alone have more than two dimensions.
        squares += sum(float(gradient.square().sum()) for _, gradient, _, _ in parameters if rank == 0 or gradient.dim() > 2)
    assert [norm for _, norm in results] == pytest.approx([squares**0.5] * 2, rel=1e-5)


def build(rank: int, world_size: int, name: str) -> str:
    config = tiny_config(optimizer={"name": name})
    with distributed(config.parallel), pytest.raises(ConfigurationError) as raised:
        build_trained_model(config)
    return str(raised.value)


def test_an_unknown_optimizer_is_an_error_that_names_the_known_ones():
    (message,) = run_distributed(build, 1, "adamW")
    valid = ", ".join(optimizers.OPTIMIZERS)
    assert f"optimizer.name\n   found: 'adamW'\n   valid: one of: {valid}\n   try:   did you mean adamw?" in message
