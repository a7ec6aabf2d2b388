"""One layer of the diffusion Transformer, and the spec that assembles it from megatron-core's modules.

    h = h + gate_a * Attention(RMSNorm(h) * (1 + scale_a) + shift_a)
    h = h + gate_m * SwiGLU(RMSNorm(h) * (1 + scale_m) + shift_m)

The six vectors are computed from the segment's condition (adaLN-Zero, arXiv 2212.09748, section 3.2; W1 uses it). A model without
conditioning (LLaDA) does not have these vectors: both lines are then a norm, a block and a residual.

Shapes: s = tokens of this rank, b = samples, h = hidden size, g = segments, c = condition size, d = channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from w1train.attention.attention_plan import AttentionPlan
from w1train.attention.core_attention import CoreAttention
from w1train.config.schema import ModelConfig
from w1train.config.schema_adapters import AdaptersConfig
from w1train.kernels.modulation import gate_residual
from w1train.kernels.segments import Segments
from w1train.model.adapters import adapted
from w1train.model.conditioning import Modulation
from w1train.model.experts.expert_layer import ExpertLayer
from w1train.model.experts.routed_tokens import RoutedTokens
from w1train.model.linears import linears
from w1train.model.megatron_config import has_experts
from w1train.model.norm import ModulatedRMSNorm, RMSNorm


@dataclass(slots=True)
class LayerInputs:
    """The inputs that all layers of a micro-batch share besides the hidden states.

    It is passed in megatron-core's ``packed_seq_params`` argument, the only argument besides tensors that TransformerBlock passes on to
    its layers under every kind of recomputation.
    """

    attention_plan: AttentionPlan
    segments: Segments
    """Rows of the condition table, for this rank's tokens [s, b]."""
    tokens: RoutedTokens | None = None
    """The tokens, as far as the router of a mixture of experts knows them; None = tokens are not counted."""
    qkv_format: ClassVar[str] = "sbhd"
    """megatron-core's Attention reads this attribute by its name. It changes the layout of its tensors only if the value is "thd"."""


class DiffusionTransformerLayer(TransformerLayer):
    """megatron-core's layer with adaLN between norm and linear, and gates on both residual branches.

    The condition table [g, c] is passed in ``context``, which decoder-only models do not use. It has to be a tensor argument, so that its
    gradient survives activation recomputation.
    """

    def __init__(self, config: TransformerConfig, submodules: TransformerLayerSubmodules, condition_size: int | None = None, **kwargs: Any):
        super().__init__(config=config, submodules=submodules, **kwargs)
        self.modulation = None if condition_size is None else Modulation(config, condition_size, num_vectors=6)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: LayerInputs | None = None,
        **_unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (hidden_states, context), from hidden_states [s, b, h], context [g, c] and rotary_pos_emb [S, b, 1, d]."""
        assert packed_seq_params is not None
        attention = partial(
            self.self_attention, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params
        )
        segments = packed_seq_params.segments
        if self.modulation is None:
            hidden_states = hidden_states + attention(self.input_layernorm(hidden_states, segments=segments))[0]
            return hidden_states + self._mlp(self.pre_mlp_layernorm(hidden_states, segments=segments), packed_seq_params), context
        gated = partial(gate_residual, segments=segments, implementation=self.config.elementwise_kernels)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(context)
        normed = self.input_layernorm(hidden_states, shift_a, scale_a, segments)
        hidden_states = gated(hidden_states, gate_a, attention(normed)[0])
        normed = self.pre_mlp_layernorm(hidden_states, shift_m, scale_m, segments)
        return gated(hidden_states, gate_m, self._mlp(normed, packed_seq_params)), context

    def _mlp(self, hidden_states: Tensor, inputs: LayerInputs) -> Tensor:
        return (self.mlp(hidden_states, inputs.tokens) if self.is_moe_layer else self.mlp(hidden_states))[0]


def layer_specs(model: ModelConfig, adapters: AdaptersConfig, layers: range) -> TransformerBlockSubmodules:
    """Return the parts of some layers of the whole model: those of one pipeline stage."""
    dense, experts = (_layer_spec(model, adapters, has_experts=has_experts) for has_experts in (False, True))
    is_expert_layer = has_experts(model)
    return TransformerBlockSubmodules(layer_specs=[experts if is_expert_layer[layer] else dense for layer in layers])


def _layer_spec(model: ModelConfig, adapters: AdaptersConfig, *, has_experts: bool) -> ModuleSpec:
    """Return the parts of a layer. The linears have no norm fused into them, because modulation comes between norm and linear."""
    linear = partial(adapted, linears(model.transformer_impl), adapters=adapters)
    qk_norm = RMSNorm if model.qk_norm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear("self_attention.linear_qkv"),
            core_attention=CoreAttention,
            linear_proj=linear("self_attention.linear_proj"),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    dense, shared = (
        MLPSubmodules(linear_fc1=linear(f"{mlp}.linear_fc1"), linear_fc2=linear(f"{mlp}.linear_fc2"))
        for mlp in ("mlp", "mlp.shared_experts")
    )
    return ModuleSpec(
        module=DiffusionTransformerLayer,
        params={"condition_size": model.condition_size if model.conditioning == "adaln" else None},
        submodules=TransformerLayerSubmodules(
            input_layernorm=ModulatedRMSNorm,
            self_attention=attention,
            pre_mlp_layernorm=ModulatedRMSNorm,
            mlp=partial(ExpertLayer, experts=model.experts, shared=shared)
            if has_experts
            else partial(MLP.as_mlp_submodule, submodules=dense),
        ),
    )
