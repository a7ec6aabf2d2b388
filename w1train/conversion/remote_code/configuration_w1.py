"""Configuration of W1ForMaskedDiffusion, a diffusion language model trained with w1train."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class W1Config(PretrainedConfig):
    """Sizes and switches of the model. Fields that Llama also has have the names of transformers' LlamaConfig.

    Further fields: ``qk_norm`` (RMSNorm on each head's query and key), ``qkv_bias``, ``conditioning`` ("adaln": the timestep modulates
    every layer; "none"), ``mask_token_id``, ``exclude_mask_logit`` (the mask token is never predicted), and ``rotary_channels`` (the
    channels of a head that the rotary embedding turns; None = all).

    ``experts`` is None for a dense model. For a mixture of experts it is a dictionary: ``num_experts``; ``num_active`` of them compute a
    token; ``ffn_hidden_size`` of each; ``shared_ffn_hidden_size`` of the expert of all tokens (0 = there is no such expert);
    ``num_dense_layers`` (the first layers, which have ``intermediate_size``); ``score`` ("softmax" over all experts, or "sigmoid");
    ``normalize`` (the weights of a token's experts add up to 1); ``scale`` (a factor of the weights); ``num_groups`` of experts, of which a
    token may use ``num_active_groups``; ``has_bias`` (a number for each expert is added to its score in the choice, and not to its weight);
    and ``router_precision`` of the router's logits ("fp32" or "model").

    These fields say what the model was trained to predict, and from what:

    - ``process``: the noise, "masked diffusion" (mask tokens replace tokens), "autoregressive" (no noise), or in words another noise, such
      as "uniform diffusion" (any tokens replace tokens) and "hybrid diffusion" (mask tokens and others).
    - ``prediction``: "full" (the distribution of the clean token, given everything that its position sees), "leave_one_out" (given
      everything but the token at the position itself; both are the same at mask tokens) or "next_token" (of the clean token, given the
      tokens before it).
    - ``shift``: whether the network's output at a position is for the next token. The model's forward pass moves outputs, so that its
      logits at a position are always those of the position's own token.
    - ``block_size``: the number of tokens that are denoised together, after clean blocks; None = all tokens of a document.
    - ``block_index``: where training counted blocks from, "document" or "sample" (the packed sequence that holds the document). The
      forward pass counts them from position 0.
    - ``clean_attention``: what a token of a clean block sees of its block, all of it ("block_causal") or the tokens up to itself
      ("token_causal").
    - ``noisy_attention``: what a token of a block with mask tokens sees of its block, all of it ("bidirectional") or the tokens up to
      itself ("causal").
    """

    model_type = "w1"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 4096,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        conditioning: str = "none",
        condition_size: int = 256,
        timestep_frequency_size: int = 256,
        timestep_scale: float = 1000.0,
        rotary_channels: int | None = None,
        experts: dict[str, Any] | None = None,
        mask_token_id: int | None = None,
        exclude_mask_logit: bool = True,
        process: str = "masked diffusion",
        prediction: str = "full",
        shift: bool = False,
        block_size: int | None = None,
        block_index: str | None = None,
        clean_attention: str | None = None,
        noisy_attention: str = "bidirectional",
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.qk_norm, self.qkv_bias = qk_norm, qkv_bias
        self.conditioning = conditioning
        self.condition_size = condition_size
        self.timestep_frequency_size = timestep_frequency_size
        self.timestep_scale = timestep_scale
        self.rotary_channels = rotary_channels
        self.experts = experts
        self.mask_token_id = mask_token_id
        self.exclude_mask_logit = exclude_mask_logit
        self.process, self.prediction = process, prediction
        self.shift = shift
        self.block_size, self.block_index = block_size, block_index
        self.clean_attention, self.noisy_attention = clean_attention, noisy_attention
        self.initializer_range = initializer_range
        # The default of tie_word_embeddings differs between versions of transformers.
        super().__init__(**{"tie_word_embeddings": False, **kwargs})
