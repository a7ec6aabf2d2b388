"""Conditioning on the timestep: sinusoid, MLP, and the vectors that modulate the layers.

A segment is a stretch of tokens that share a timestep. adaLN gives each segment one row of shifts, scales and gates, which layers apply
with w1train.kernels.modulation.

Shapes: h = hidden size, g = segments of the micro-batch, c = condition size, f = frequency size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from w1train.config.schema import ModelConfig
from w1train.model.megatron_config import parameter_device
from w1train.runtime.ranges import kernel_group

MAX_PERIOD = 10000.0


class ReplicatedLinear(torch.nn.Linear):
    """A linear layer of which every tensor-parallel rank has the whole weight.

    Under sequence parallelism each rank sees only its own tokens, so the gradients of weight AND bias must be summed over the
    tensor-parallel group. (If only the weight had the flag, the replicas of the bias would drift apart.)
    """

    def __init__(self, input_size: int, output_size: int, config: TransformerConfig) -> None:
        super().__init__(input_size, output_size, bias=True, dtype=config.params_dtype, device=parameter_device(config))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def reset_parameters(self) -> None:
        """Do nothing: ``initialize_parameters`` fills the weights, with the same values under every layout."""


class TimestepEmbedding(MegatronModule):
    """The map from t to the condition vector: fp32 sinusoid of width f, Linear, SiLU, Linear (DiT, arXiv 2212.09748, section 3.2).

    Every pipeline stage has a replica, because every stage modulates. The gradients of the stages must be summed.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig) -> None:
        super().__init__(config=config)
        self.frequency_size = model.timestep_frequency_size
        self.scale = model.timestep_scale
        self.linear_in = ReplicatedLinear(model.timestep_frequency_size, model.condition_size, config)
        self.linear_out = ReplicatedLinear(model.condition_size, model.condition_size, config)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return the conditions [g, c] of timesteps, float32 [g] in [0, 1]."""
        sinusoid = timestep_sinusoid(timesteps * self.scale, self.frequency_size)
        return self.linear_out(F.silu(self.linear_in(sinusoid.to(self.linear_in.weight.dtype))))


def timestep_sinusoid(timesteps: Tensor, size: int) -> Tensor:
    """Return cos and sin of t at geometrically spaced frequencies, float32 [g, size], from float32 [g].

    bf16 does not suffice, because its numbers between 0.5 and 1 are 0.004 apart.
    """
    exponents = torch.arange(size // 2, dtype=torch.float32, device=timesteps.device) / (size // 2)
    frequencies = torch.exp(-math.log(MAX_PERIOD) * exponents)
    angles = timesteps.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Modulation(MegatronModule):
    """adaLN's linear map from SiLU(condition) to ``num_vectors`` vectors of width h for each segment."""

    def __init__(self, config: TransformerConfig, condition_size: int, num_vectors: int) -> None:
        super().__init__(config=config)
        self.num_vectors = num_vectors
        self.linear = ReplicatedLinear(condition_size, num_vectors * config.hidden_size, config)

    @kernel_group("norm and modulation")
    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Return ``num_vectors`` tensors [g, h], from conditions [g, c]."""
        return self.linear(F.silu(condition)).chunk(self.num_vectors, dim=-1)
