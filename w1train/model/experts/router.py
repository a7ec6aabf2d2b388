"""The router: which experts compute a token, and with which weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from w1train.config.schema_model import ExpertsConfig
from w1train.model.experts.block_pools import choose_in_pools
from w1train.model.experts.routed_tokens import RoutedTokens, TokenKind
from w1train.model.experts.router_losses import AddLoss, RouterLosses


class ExpertRouter(TopKRouter):
    """megatron-core's router, which counts the tokens of each expert by kind.

    megatron-core's own counts include padding, and its bias moves while gradients are reduced, before anyone knows whether the step is
    accepted. Therefore megatron-core is not told of the bias, and :mod:`w1train.engine.expert_balance` moves it.
    """

    def __init__(
        self, config: TransformerConfig, experts: ExpertsConfig, pg_collection: ProcessGroupCollection | None = None, **kwargs: Any
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        self.pool_size = experts.pool_per_block
        device = torch.cuda.current_device()
        if experts.has_bias:
            del self.expert_bias
            self.register_buffer("expert_bias", torch.zeros(experts.num_experts, dtype=torch.float32, device=device))
        # Counts of a step stay below 2^53, so that float64 holds them exactly.
        counts = torch.zeros(len(TokenKind), experts.num_experts, dtype=torch.float64, device=device)
        self.register_buffer("counts", counts, persistent=False)
        # The sums over the step of what RouterLosses.values returns.
        self.register_buffer("losses", torch.zeros(3, dtype=torch.float64, device=device), persistent=False)

    def forward(self, hidden_states: Tensor, tokens: RoutedTokens | None = None) -> tuple[Tensor, Tensor]:
        """Return the weights of the experts, [s * b, E] with zeros for experts that are not chosen, and the choice, bool [s * b, E].

        Args:
            hidden_states: [s, b, h].
            tokens: what is known about the tokens; None = nothing is known.
        """
        logits = self.gating(hidden_states).flatten(0, 1)
        weights, is_chosen = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            precomputed_indices=self._choose_in_pools(logits, tokens) if self.pool_size else None,
        )
        if tokens is not None and tokens.kinds is not None and torch.is_grad_enabled():
            self._count(is_chosen, tokens.kinds.flatten())
            if tokens.losses is not None:
                weights = self._add_losses(weights, logits, is_chosen, tokens.kinds, tokens.losses)
        return weights, is_chosen

    @torch.no_grad()
    def _choose_in_pools(self, logits: Tensor, tokens: RoutedTokens | None) -> Tensor:
        """Return the experts of each token, [s * b, k], if the tokens of a block share a pool."""
        blocks = None if tokens is None else tokens.blocks
        assert blocks is not None, "pools of experts (model.experts.pool_per_block) need the blocks of the tokens"
        wide = logits.float()
        scores = wide.sigmoid() if self.score_function == "sigmoid" else wide.softmax(dim=1)
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        return choose_in_pools(scores, blocks, self.pool_size, self.topk, self._others)

    @property
    def _others(self) -> dist.ProcessGroup | None:
        """The ranks that have the other tokens of this rank's samples; None if this rank has all tokens."""
        group = self.tp_cp_group if self.config.sequence_parallel else self.cp_group
        return group if group.size() > 1 else None

    def _add_losses(self, weights: Tensor, logits: Tensor, is_chosen: Tensor, kinds: Tensor, losses: RouterLosses) -> Tensor:
        """Return the weights, whose backward pass also differentiates the losses, and add the losses to those of the step."""
        shape = (*kinds.shape, self.num_experts)
        values = losses.values(logits.view(shape), is_chosen.view(shape), kinds, self.score_function, self.topk, self._others)
        self.losses += values.detach()
        return AddLoss.apply(weights, losses.loss(values))

    @torch.no_grad()
    def _count(self, is_chosen: Tensor, kinds: Tensor) -> None:
        """Add the tokens of each kind, uint8 [s * b], to the counts of their experts. With full recomputation a layer runs twice, and only
        its second run has gradients."""
        is_kind = kinds[None] == torch.arange(len(TokenKind), device=kinds.device)[:, None]
        self.counts += is_kind.to(torch.float64) @ is_chosen.to(torch.float64)
