"""Adapters with values for tests."""

import torch
from megatron.core import parallel_state

from w1train.config.schema_adapters import LORA_B
from w1train.engine.building import TrainedModel
from w1train.model.initialization import Slice, _fill_normal, global_named_parameters


def open_adapters(model: TrainedModel) -> None:
    """Give B values that depend on its name alone, because a B of zero hides every mistake of A."""
    part = Slice(parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size())
    with torch.no_grad():
        for stage in model.stages:
            for name, parameter in global_named_parameters(stage):
                if name.endswith(LORA_B):
                    dimension = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else -1
                    _fill_normal(parameter, name, 0.3, 7, dimension, part)
    model.optimizer.reload_model_params()
