"""Learned rates of noise, one for each token of the vocabulary (GenMD4, arXiv 2406.04329, section 6).

Shapes: v = whole vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from w1train.model.megatron_config import parameter_device


class NoiseRates(MegatronModule):
    """The rates w > 0 of all tokens, as the softplus of a parameter.

    Only the last pipeline stage has them, because only the loss has a gradient for them. All ranks of its tensor-parallel group have the
    whole vector: the corruption needs the rate of any token.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, tensor_group: dist.ProcessGroup) -> None:
        super().__init__(config=config)
        self._tensor_group = tensor_group
        self.unconstrained = torch.nn.Parameter(torch.empty(vocab_size, dtype=config.params_dtype, device=parameter_device(config)))

    def forward(self) -> Tensor:
        """Return the rates, float32 [v]. Their gradients are added up over the ranks that share the vocabulary, so that the replicas of the
        parameter stay equal to the last bit. Ranks with different rates would draw different masks.

        A gradient that is whole on every rank must therefore be given on one of the ranks alone.
        """
        return F.softplus(copy_to_tensor_model_parallel_region(self.unconstrained.float(), group=self._tensor_group))
