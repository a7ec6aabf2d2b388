"""The output head, and the cross-entropy behind it.

Shapes: m = positions with logits, h = hidden size, v = vocabulary of this rank.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from w1train.config.schema import ModelConfig
from w1train.kernels.cross_entropy import Head, linear_cross_entropy
from w1train.runtime.ranges import kernel_group


class OutputHead(ColumnParallelLinear):
    """Rows to logits of this rank's part of the vocabulary, or to their cross-entropy over all of it.

    It reads gathered rows, all of them on each rank, so it must not gather again. Under sequence parallelism its input gradients stay
    partial sums: the gather's backward adds them up while it scatters.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        *,
        mask_token_id: int | None,
        loss_chunk_size: int | None,
        has_weight: bool,
        tensor_group: torch.distributed.ProcessGroup,
    ) -> None:
        """
        Args:
            mask_token_id: the token that is taken out of the softmax; None = none is.
            loss_chunk_size: rows whose logits exist at once while the loss is computed; None = all.
            has_weight: False = it is given the embedding's in every pass.
        """
        super().__init__(
            config.hidden_size,
            model.vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=not has_weight,
            disable_grad_reduce=config.sequence_parallel,
            tp_group=tensor_group,
        )
        self.sequence_parallel = False
        self.mask_token_id, self.loss_chunk_size, self.tensor_group = mask_token_id, loss_chunk_size, tensor_group
        self.first_token = get_pg_rank(tensor_group) * (model.vocab_size // get_pg_size(tensor_group))

    @kernel_group("loss and head")
    def forward(self, rows: Tensor, weight: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
        """[m, h] -> logits [m, v]; with targets, int64 [m], cross-entropies in nats, float32 [m]."""
        if targets is not None and self.loss_chunk_size is not None:
            return linear_cross_entropy(rows, self.weight if weight is None else weight, targets, self._chunked(self.loss_chunk_size))
        logits = self._exclude_mask_token(super().forward(rows[:, None], weight=weight)[0])
        if targets is None:
            return logits[:, 0]
        # megatron-core's cross-entropy wants [sequence, batch, vocabulary].
        return vocab_parallel_cross_entropy(logits, targets[:, None], tp_group=self.tensor_group)[:, 0]

    def _chunked(self, chunk_size: int) -> Head:
        """What is said above about ranks, for the loss in chunks."""
        return Head(
            chunk_size=chunk_size,
            group=self.tensor_group if get_pg_size(self.tensor_group) > 1 else None,
            first_token=self.first_token,
            excluded_token=self.mask_token_id,
            sum_row_gradients=not self.config.sequence_parallel,
            implementation=self.config.elementwise_kernels,
        )

    def _exclude_mask_token(self, logits: Tensor) -> Tensor:
        if self.mask_token_id is None:
            return logits
        column = self.mask_token_id - self.first_token
        if 0 <= column < logits.shape[-1]:
            # In place and unseen by autograd: the cross-entropy's own gradient is zero where the probability is.
            logits.detach()[..., column] = float("-inf")
        return logits
