"""The routed experts of a rank: a SwiGLU each. Each of its two matrices is multiplied for all experts at once, or for one after another.

Shapes: E = this rank's experts, I = this rank's part of an expert's inner width, h = hidden size, T = rows (a token, once for each of its
experts on this rank), sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from w1train.model.fusions import ExpertProduct
from w1train.model.megatron_config import parameter_device


class GroupedExperts(MegatronModule):
    """The experts of a rank, in the place of megatron-core's SequentialMLP and TEGroupedMLP."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *, pg_collection: ProcessGroupCollection, name: str | None = None
    ) -> None:
        super().__init__(config)
        self.product: ExpertProduct = config.expert_product
        size = config.moe_ffn_hidden_size // get_pg_size(pg_collection.expt_tp)
        self.linear_fc1 = ExpertWeights((num_local_experts, 2, size, config.hidden_size), 2, config, pg_collection)
        self.linear_fc2 = ExpertWeights((num_local_experts, config.hidden_size, size), 2, config, pg_collection)

    def forward(self, rows: Tensor, num_rows: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """Return the experts' outputs [T, h], times the rows' weights, and no bias.

        Args:
            rows: [T, h].
            num_rows: int [E], rows of each expert. megatron-core's dispatchers have it on the CPU.
            weights: [T].
        """
        # The grouped kernel was not made for experts without any row.
        multiply = grouped_linear if self.product == "grouped_mm" and len(rows) else loop_linear
        gate, up = multiply(rows, self.linear_fc1().flatten(1, 2), num_rows).chunk(2, dim=-1)
        inner = (F.silu(gate) * up * weights[:, None]).to(rows.dtype)
        return multiply(inner, self.linear_fc2(), num_rows), None

    def backward_dw(self) -> None:
        """Do nothing: the gradients of weights are computed in the backward pass."""


class ExpertWeights(MegatronModule):
    """One matrix of each expert of a rank."""

    def __init__(
        self, shape: tuple[int, ...], partition_dim: int, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=parameter_device(config)))
        # Experts get buffers and an optimizer of their own in every layout, also where megatron-core would put them with the other
        # parameters. Otherwise a checkpoint of one layout has two optimizers and that of another has one, and neither loads the other.
        self.weight.allreduce = False
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim, self.weight.partition_stride = partition_dim, 1
        self._groups = pg_collection

    def forward(self) -> Tensor:
        """Return the weights. With parallel.overlap_param_gather, megatron-core's hook on this call waits until this step's weights have
        arrived; the parameter alone may still have the weights of the step before."""
        return self.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Return the weights as a slice of a tensor with all experts, whatever ranks hold them."""
        groups, first = self._groups, len(sharded_offsets)
        key = f"{prefix}weight"
        place = (first, get_pg_rank(groups.ep), get_pg_size(groups.ep))
        part = (first + self.weight.partition_dim, get_pg_rank(groups.expt_tp), get_pg_size(groups.expt_tp))
        replica = (0, 0, get_pg_rank(groups.expt_dp))
        shard = ShardedTensor.from_rank_offsets(key, self.weight, *sharded_offsets, place, part, replica_id=replica, prepend_axis_num=first)
        return {key: shard}


def grouped_linear(rows: Tensor, weights: Tensor, num_rows: Tensor) -> Tensor:
    """Return rows [T, in] times the transposed matrix of each row's expert: [T, out], in one grouped product.

    Args:
        weights: [E, out, in].
        num_rows: int [E], rows of each expert.
    """
    ends = num_rows.cumsum(0).to(device=rows.device, dtype=torch.int32, non_blocking=True)
    output = F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    if output.requires_grad:
        # The product refuses a gradient that is one number expanded, as the gradient of a sum is.
        output.register_hook(Tensor.contiguous)
    return output


def loop_linear(rows: Tensor, weights: Tensor, num_rows: Tensor) -> Tensor:
    """Return what ``grouped_linear`` returns, computed with a product for each expert."""
    parts = rows.split(num_rows.tolist())
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weights.unbind(), strict=True)])
