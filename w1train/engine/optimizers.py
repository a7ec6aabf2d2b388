"""The optimizers that a run can be trained with, and megatron-core's optimizer around them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig

from w1train.config.errors import look_up
from w1train.config.schema import Config
from w1train.engine.adamw import prepare_adamw
from w1train.engine.megatron_fixes import give_padded_places_for_loading
from w1train.engine.muon import prepare_muon
from w1train.engine.optimizer_slices import save_optimizer_states_in_slices
from w1train.engine.rate_multipliers import rate_overrides

Prepare = Callable[[Config], dict[str, Any]]
"""A function that prepares megatron-core for an optimizer, and returns this optimizer's own fields of megatron-core's OptimizerConfig."""

OPTIMIZERS: dict[str, Prepare] = {"adamw": prepare_adamw, "muon": prepare_muon}
"""The optimizers by their names in ``optimizer.name``. A new optimizer is a file with such a function, and an entry here."""


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Build the run's optimizer on fp32 master weights; norms, biases and other vectors have no weight decay.

    Raises:
        ConfigurationError: no optimizer is registered under ``optimizer.name``.
        UserError: the optimizer cannot be used here.
    """
    settings = config.optimizer
    own_fields = look_up(OPTIMIZERS, "optimizer.name", settings.name)(config)
    give_padded_places_for_loading()
    save_optimizer_states_in_slices()
    optimizer_config = MegatronOptimizerConfig(
        lr=0.0,  # set before every step, from the schedule
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        bf16=config.training.precision == "bf16",
        params_dtype=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        **own_fields,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        overrides = {**get_standard_config_overrides(optimizer_config), **rate_overrides([chunk.module for chunk in chunks])}
        optimizer = get_megatron_optimizer(optimizer_config, chunks, overrides, use_gloo_process_groups=False)
    for each in optimizer.chained_optimizers:
        # An optimizer that needs whole matrices looks for them in the wrapper, which has given it slices.
        if hasattr(each.optimizer, "attach"):
            each.optimizer.attach(each, chunks)
    for group in optimizer.param_groups:
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    return optimizer


def make_states(optimizer: MegatronOptimizer) -> None:
    """Make the optimizer's moments (zeros), which it otherwise makes at its first update. A save before that update (after a first step
    that was skipped) would hold no moments, and a load, which asks for all of them, would fail."""
    assert isinstance(optimizer, ChainedOptimizer), type(optimizer)
    for each in optimizer.chained_optimizers:
        # It is None on a rank that has nothing to train.
        if each.init_state_fn is not None:
            each.init_state_fn(each.optimizer, each.config)
