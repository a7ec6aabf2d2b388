"""The timestep's way into the model: sinusoid, MLP, and modulation by segment.

A segment is a stretch of tokens that share a timestep. adaLN gives one row of shifts, scales and gates per segment; a
layer gathers the rows by segment index inside its forward and again in its backward, so that no [s, b, h] modulation
tensor is ever kept between the two.

Shapes: s = tokens of this rank, b = samples, h = hidden size, g = segments of the micro-batch, c = condition size,
f = frequency size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from w1train.config.schema import ModelConfig
from w1train.model.megatron_config import parameter_device

MAX_PERIOD = 10000.0


class ReplicatedLinear(torch.nn.Linear):
    """A linear layer whose whole weight lives on every tensor-parallel rank.

    Under sequence parallelism each rank sees only its tokens, so the gradient of weight AND bias must be summed over the
    tensor-parallel group (flagging the weight alone lets the replicas drift apart).
    """

    def __init__(self, input_size: int, output_size: int, config: TransformerConfig) -> None:
        super().__init__(input_size, output_size, bias=True, dtype=config.params_dtype, device=parameter_device(config))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def reset_parameters(self) -> None:
        """Left to ``initialize_parameters``, which is the same under every layout."""


class TimestepEmbedding(MegatronModule):
    """t -> condition vector: fp32 sinusoid of width f, Linear, SiLU, Linear (DiT, arXiv 2212.09748, section 3.2).

    Replicated on every pipeline stage, because every stage modulates; the stages' gradients must be summed.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig) -> None:
        super().__init__(config=config)
        self.frequency_size = model.timestep_frequency_size
        self.scale = model.timestep_scale
        self.linear_in = ReplicatedLinear(model.timestep_frequency_size, model.condition_size, config)
        self.linear_out = ReplicatedLinear(model.condition_size, model.condition_size, config)

    def forward(self, timesteps: Tensor) -> Tensor:
        """float32 [g] in [0, 1] -> [g, c]."""
        sinusoid = timestep_sinusoid(timesteps * self.scale, self.frequency_size)
        return self.linear_out(F.silu(self.linear_in(sinusoid.to(self.linear_in.weight.dtype))))


def timestep_sinusoid(timesteps: Tensor, size: int) -> Tensor:
    """cos and sin of t at geometrically spaced frequencies, in fp32 (bf16 has 8 bits: it cannot tell t = 0.500 from 0.502).

    float32 [g] -> float32 [g, size].
    """
    exponents = torch.arange(size // 2, dtype=torch.float32, device=timesteps.device) / (size // 2)
    frequencies = torch.exp(-math.log(MAX_PERIOD) * exponents)
    angles = timesteps.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Modulation(MegatronModule):
    """adaLN's linear map: SiLU(condition) -> ``num_vectors`` vectors of width h per segment."""

    def __init__(self, config: TransformerConfig, condition_size: int, num_vectors: int) -> None:
        super().__init__(config=config)
        self.num_vectors = num_vectors
        self.linear = ReplicatedLinear(condition_size, num_vectors * config.hidden_size, config)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """[g, c] -> num_vectors tensors [g, h]."""
        return self.linear(F.silu(condition)).chunk(self.num_vectors, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, segment_index: Tensor | None) -> Tensor:
    """x * (1 + scale[segment]) + shift[segment].

    Args:
        x: [s, b, h] (or [m, h] with segment_index [m]).
        shift, scale: [g, h].
        segment_index: int64 [s, b]; None = segment i is sample i (one timestep per sequence).
    """
    return _Modulate.apply(x, shift, scale, segment_index)


def gate_residual(residual: Tensor, gate: Tensor, x: Tensor, segment_index: Tensor | None) -> Tensor:
    """residual + gate[segment] * x, shapes as in ``modulate``."""
    return _GateResidual.apply(residual, gate, x, segment_index)


def _rows(table: Tensor, segment_index: Tensor | None) -> Tensor:
    """The table's row for each token; [1, b, h] (a view) when samples are segments."""
    return table[None] if segment_index is None else table[segment_index]


def _sum_by_segment(gradient: Tensor, table: Tensor, segment_index: Tensor | None) -> Tensor:
    """Sum [s, b, h] over each segment's tokens in fp32 -> [g, h]."""
    if segment_index is None:
        return gradient.sum(dim=0, dtype=torch.float32).to(table.dtype)
    sums = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
    sums.index_add_(0, segment_index.flatten(), gradient.reshape(-1, gradient.shape[-1]).float())
    return sums.to(table.dtype)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, segment_index: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, shift, scale, segment_index)
        return torch.addcmul(_rows(shift, segment_index), x, 1 + _rows(scale, segment_index))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, shift, scale, segment_index = ctx.saved_tensors
        grad_x = gradient * (1 + _rows(scale, segment_index))
        grad_shift = _sum_by_segment(gradient, shift, segment_index)
        return grad_x, grad_shift, _sum_by_segment(gradient * x, scale, segment_index), None


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, gate: Tensor, x: Tensor, segment_index: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, x, segment_index)
        return torch.addcmul(residual, _rows(gate, segment_index), x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gate, x, segment_index = ctx.saved_tensors
        return gradient, _sum_by_segment(gradient * x, gate, segment_index), gradient * _rows(gate, segment_index), None
