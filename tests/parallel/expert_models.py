"""A tiny mixture of experts whose balancing bias is not zero, in any layout."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny import tiny_config
from w1train.config.schema import Config
from w1train.engine.building import TrainedModel
from w1train.model.experts.router import ExpertRouter

NUM_EXPERTS = 8
# Ling's kind of router: sigmoid scores, groups, a factor, and a bias; with a shared expert, and a dense first layer.
EXPERTS = {
    "num_experts": NUM_EXPERTS,
    "num_active": 2,
    "ffn_hidden_size": 16,
    "shared_ffn_hidden_size": 24,
    "num_dense_layers": 1,
    "score": "sigmoid",
    "scale": 2.5,
    "num_groups": 4,
    "num_active_groups": 2,
    "has_bias": True,
}


def expert_config(micro_batch_size: int = 2, experts: dict[str, Any] | None = None, **parallel: Any) -> Config:
    """Four layers and two streams, eight samples in a step."""
    config = tiny_config(
        model={"num_layers": 4, "qk_norm": True},
        parallel={"context_chunk_size": 4, **parallel},
        diffusion={"block_size": 4, "block_index": "sample", "timestep_per": "block"},
        training={"global_batch_size": 8, "micro_batch_size": micro_batch_size},
    )
    for name, value in {**EXPERTS, **(experts or {})}.items():
        setattr(config.model.experts, name, value)
    return config


@torch.no_grad()
def unbalance(model: TrainedModel) -> None:
    """Give each router larger weights and a bias that is not zero. With the small weights of the initialization the scores of some tokens
    are so near to each other that the rounding of a layout chooses another expert."""
    for stage in model.stages:
        for layer in stage.decoder.layers:
            for module in layer.modules():
                if isinstance(module, ExpertRouter):
                    module.weight.mul_(20)
                    generator = torch.Generator().manual_seed(layer.layer_number)
                    module.expert_bias.copy_(0.3 * torch.randn(NUM_EXPERTS, generator=generator))
    model.optimizer.reload_model_params()
