"""The learning rates with which a step of the loop is made."""

from __future__ import annotations

from types import SimpleNamespace

from tests.tiny import tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.training import loop  # noqa: E402
from w1train.training.loop import Trainer  # noqa: E402
from w1train.training.measurement import Measurement  # noqa: E402


def test_every_group_has_its_multiple_of_the_schedules_rate(monkeypatch):
    """When the gradients of the step are prepared, the rates of the step before are gone."""
    groups = [{"lr": 7.0, "lr_mult": multiple} for multiple in (1.0, 0.25, 0.0)]
    optimizer = SimpleNamespace(param_groups=groups)
    balance = SimpleNamespace(gather=lambda: {})
    functions = {"zero_gradients": lambda: None, "noise_rates": lambda: None}
    model = SimpleNamespace(chunks=[], optimizer=optimizer, expert_balance=balance, **functions)
    config = tiny_config()
    gradients = SimpleNamespace(begin=lambda: None, are_finite=lambda: True)
    trainer = SimpleNamespace(
        config=config,
        position=SimpleNamespace(stage=config, learning_rate=0.5),
        model=model,
        guard=SimpleNamespace(local_gradients=gradients),
        ranks=SimpleNamespace(data_parallel_size=2),
        measurement=Measurement(None),
    )
    asked = []
    monkeypatch.setattr(loop, "run_micro_batches", lambda stage, chunks, batches, number, *, training: asked.append(number) or ({}, None))
    monkeypatch.setattr(loop, "prepare_gradients", lambda optimizer: asked.append([group["lr"] for group in optimizer.param_groups]) or 1.0)
    computed = Trainer.compute_step(trainer, iter(()))
    num_micro_batches = config.training.global_batch_size // (2 * config.training.micro_batch_size)
    assert asked == [num_micro_batches, [0.5, 0.125, 0.0]]
    assert computed.values == {"grad_norm": 1.0, "learning_rate": 0.5, "batch_size": config.training.global_batch_size}
