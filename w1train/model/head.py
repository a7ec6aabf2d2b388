"""The output head: logits of rows, or the terms that are asked of these logits.

Shapes: m = positions with logits, h = hidden size, v = vocabulary of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from w1train.config.schema import ModelConfig
from w1train.model.chunked_head import Head, linear_row_terms
from w1train.model.row_terms import CrossEntropy, RowTerm, Vocabulary
from w1train.runtime.ranges import kernel_group


class OutputHead(ColumnParallelLinear):
    """A layer from rows to the logits of this rank's part of the vocabulary, or to terms of the logits over all of it.

    Each rank is given all rows, already gathered. Under sequence parallelism the gradients of the rows therefore stay partial sums: the
    backward pass of the gather adds them up while it scatters them.
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
            mask_token_id: the token that is taken out of the softmax; None = every token is in it.
            loss_chunk_size: rows whose logits exist at once while terms are computed; None = all rows.
            has_weight: False = every pass is given the weight of the embedding.
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
    def forward(self, rows: Tensor, weight: Tensor | None = None, terms: Sequence[RowTerm] | None = None) -> Tensor | tuple[Tensor, ...]:
        """Return the logits [m, v] of rows [m, h], or the value of each term that is asked for.

        Without a chunk size, the cross-entropy alone is megatron-core's, which keeps the softmax for the backward pass. Other terms are
        computed in one chunk of all rows.
        """
        if terms is None:
            return self._logits(rows, weight)[:, 0]
        if self.loss_chunk_size is not None:
            return self._in_chunks(rows, weight, terms, self.loss_chunk_size)
        match terms:
            case [CrossEntropy(targets)]:
                # megatron-core's cross-entropy wants [sequence, batch, vocabulary].
                logits = self._logits(rows, weight)
                return (vocab_parallel_cross_entropy(logits, targets[:, None], tp_group=self.tensor_group)[:, 0],)
            case _:
                return self._in_chunks(rows, weight, terms, max(1, len(rows)))

    def _logits(self, rows: Tensor, weight: Tensor | None) -> Tensor:
        """Return the logits of the rows, [m, 1, v]."""
        return self._exclude_mask_token(super().forward(rows[:, None], weight=weight)[0])

    def _in_chunks(self, rows: Tensor, weight: Tensor | None, terms: Sequence[RowTerm], chunk_size: int) -> tuple[Tensor, ...]:
        vocabulary = Vocabulary(
            group=self.tensor_group if get_pg_size(self.tensor_group) > 1 else None,
            first_token=self.first_token,
            excluded_token=self.mask_token_id,
            implementation=self.config.elementwise_kernels,
        )
        head = Head(vocabulary, chunk_size, sum_row_gradients=not self.config.sequence_parallel)
        return linear_row_terms(rows, self.weight if weight is None else weight, terms, head)

    def _exclude_mask_token(self, logits: Tensor) -> Tensor:
        if self.mask_token_id is None:
            return logits
        column = self.mask_token_id - self.first_token
        if 0 <= column < logits.shape[-1]:
            # The change is in place and without autograd, because the gradient of the cross-entropy is zero where the probability is zero.
            logits.detach()[..., column] = float("-inf")
        return logits
