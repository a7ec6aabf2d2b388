"""Overrides of commands from before options became names in tables (objectives, losses, rules of sampling, backends, optimizers).

Command lines are kept in job scripts, and old runs start again with them: each must compose to what it meant."""

from __future__ import annotations

from typing import Any

import pytest

from w1train.config.compose import load_config
from w1train.config.serialization import flatten
from w1train.registered_names import NAME_RULES

BLOCKS: dict[str, Any] = {
    "model.transformer_impl=te": "te",
    "model.conditioning=none": "none",
    "data.loader=dali": "dali",
    "data.packing=best_fit": "best_fit",
    "diffusion.objective=diffusion": "diffusion",
    "diffusion.block_size=32": 32,
    "diffusion.timestep_per=block": "block",
    "diffusion.weight=inverse_fraction": "inverse_fraction",
    "diffusion.normalizer=masked_tokens": "masked_tokens",
    "diffusion.autoregressive_weight=0.5": 0.5,
    "diffusion.clean_attention=token_causal": "token_causal",
    "diffusion.shift=true": True,
    "parallel.recompute=selective": "selective",
    "attention.backend=te": "te",
    "optimizer.beta1=0.8": 0.8,
    "optimizer.beta2=0.99": 0.99,
    "optimizer.epsilon=1e-6": 1e-6,
    "optimizer.weight_decay=0.0": 0.0,
    "optimizer.clip_grad=0.5": 0.5,
    "+optimizer.rate_multipliers.embedding=0.1": 0.1,
    "schedule.stages.stable.tokens=2e6": 2_000_000,
    "schedule.stages.stable.global_batch_size=32": 32,
    "schedule.stages.stable.style=cosine": "cosine",
    "+schedule.stages.stable.diffusion.block_size=64": 64,
    "+schedule.stages.decay.diffusion.objective=autoregressive": "autoregressive",
    "training.precision=bf16": "bf16",
    "kernels.elementwise=torch": "torch",
    "kernels.adamw=apex": "apex",
    "sampling.remasking=random": "random",
    "sampling.block_size=16": 16,
    "logging.wandb=disabled": "disabled",
}
"""The value of each override's key. It changes recipe=demo schedule=masked, whose batch divides by 32."""
NEXT_TOKENS: dict[str, Any] = {
    "diffusion.objective=autoregressive": "autoregressive",
    "attention.backend=reference": "reference",
    "sampling.interval=0": 0,
    "sampling.remasking=low_confidence": "low_confidence",
    "~schedule.stages.decay": None,
}


@pytest.mark.parametrize("overrides", [BLOCKS, NEXT_TOKENS], ids=["blocks", "next tokens"])
def test_old_overrides_mean_what_they_meant(overrides: dict[str, Any]) -> None:
    config = load_config(["recipe=demo", "schedule=masked", *overrides])
    assert [problem for rule in NAME_RULES for problem in rule(config)] == []
    values = flatten(config)
    meant = {override.strip("+").partition("=")[0]: value for override, value in overrides.items() if not override.startswith("~")}
    assert {key: values.get(key) for key in meant} == meant
    assert all(type(values[key]) is type(value) for key, value in meant.items())
    assert not any(key.startswith(override[1:]) for override in overrides if override.startswith("~") for key in values)
    # Keys that came later have the values that were fixed before.
    assert (values["diffusion.loss"], values["optimizer.name"]) == ("cross_entropy", "adamw")
