"""RMSNorm, plain and modulated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from w1train.kernels.modulation import rms_norm
from w1train.kernels.segments import Segments
from w1train.model.megatron_config import parameter_device


class RMSNorm(torch.nn.Module):
    """y = x / rms(x) * weight over the last dimension, computed in fp32 (arXiv 1910.07467).

    megatron-core's own wrapper of torch's RMSNorm refuses sequence parallelism. There each rank normalises a slice of the tokens, and the
    weight's flag makes megatron-core sum its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype, device=parameter_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., hidden_size], in the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ModulatedRMSNorm(RMSNorm):
    """The norm before a layer's linears, with adaLN's shift and scale in the same kernel if the model is conditioned."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(config, hidden_size, eps)
        self.implementation = config.elementwise_kernels

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None, segments: Segments | None = None) -> Tensor:
        """Return the modulated norm of x [s, b, h] with shift and scale [g, h]; x may be [m, h], with segments that have an index [m]."""
        return rms_norm(x, self.weight, self.eps, shift, scale, segments, self.implementation)
