"""The layer that takes the place of the MLP: it routes tokens, sends them to their experts, and adds up what comes back."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from w1train.config.schema_model import ExpertsConfig
from w1train.model.experts.grouped_mlp import GroupedExperts
from w1train.model.experts.routed_tokens import RoutedTokens
from w1train.model.experts.router import ExpertRouter


class ExpertLayer(MoELayer):
    """megatron-core's layer with the router and the experts of this project, which tells the router what kind of token each token is."""

    def __init__(self, config: TransformerConfig, experts: ExpertsConfig, shared: MLPSubmodules, **kwargs: Any) -> None:
        """Build the layer. TransformerLayer passes ``pg_collection``, ``is_mtp_layer`` and ``name``.

        Args:
            shared: the linear layers of the shared expert.
        """
        submodules = MoESubmodules(
            experts=GroupedExperts,
            shared_experts=partial(SharedExpertMLP, submodules=shared) if experts.shared_ffn_hidden_size else None,
            router=partial(ExpertRouter, experts=experts),
        )
        # TransformerLayer's groups lack those of experts, and MoELayer finds these itself.
        kwargs.pop("pg_collection", None)
        super().__init__(config=config, submodules=submodules, **kwargs)

    def forward(self, hidden_states: Tensor, tokens: RoutedTokens | None = None) -> tuple[Tensor, None]:
        """Return the experts' weighted outputs [s, b, h], and no bias."""
        if self.moe_layer_recompute:
            return checkpoint(partial(self._compute, tokens=tokens), False, hidden_states), None
        return self._compute(hidden_states, tokens), None

    def _compute(self, hidden_states: Tensor, tokens: RoutedTokens | None) -> Tensor:
        shared = None if self.shared_experts is None else self.shared_experts(hidden_states)
        weights, is_chosen = self.router(hidden_states, tokens)
        dispatcher = self.token_dispatcher
        rows, weights = dispatcher.dispatch_preprocess(hidden_states, is_chosen, weights)
        rows, weights = dispatcher.token_dispatch(rows, weights)
        rows, num_rows, weights = dispatcher.dispatch_postprocess(rows, weights)
        rows, _ = self.experts(rows, num_rows, weights)
        output = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows)))
        return output if shared is None else output + shared
