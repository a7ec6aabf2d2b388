"""A diffusion language model trained with w1train, for transformers: AutoModel.from_pretrained(..., trust_remote_code=True).

    h = h + gate_a * Attention(RMSNorm(h) * (1 + scale_a) + shift_a)
    h = h + gate_m * SwiGLU(RMSNorm(h) * (1 + scale_m) + shift_m)

Shifts, scales and gates come from the timestep; with conditioning "none" there are no shifts, scales and gates. A mixture of experts has
W1Experts in the place of SwiGLU. Every token attends to
the whole sequence, or in a model of block diffusion to its own block and to earlier blocks, unless a mask is given.

Shapes: b = samples, l = tokens of a sample, h = hidden size, n = heads, d = channels of a head, r = rotated channels of a head,
v = vocabulary, c = condition size, E = experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_w1 import W1Config

MAX_PERIOD = 10000.0


class W1RMSNorm(nn.Module):
    """RMSNorm: y = x / rms(x) * weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class W1TimestepEmbedding(nn.Module):
    """Map of t to the condition vector: fp32 sinusoid, Linear, SiLU, Linear."""

    def __init__(self, config: W1Config) -> None:
        super().__init__()
        self.size, self.scale = config.timestep_frequency_size, config.timestep_scale
        self.linear_in = nn.Linear(config.timestep_frequency_size, config.condition_size)
        self.linear_out = nn.Linear(config.condition_size, config.condition_size)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return the condition vectors [b, 1 or l, c] of timesteps, float [b, 1 or l]."""
        exponents = torch.arange(self.size // 2, dtype=torch.float32, device=timesteps.device) / (self.size // 2)
        angles = (timesteps.float() * self.scale)[..., None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_out(F.silu(self.linear_in(sinusoid.to(self.linear_in.weight.dtype))))


class W1Modulation(nn.Module):
    """Map of the condition to ``num_vectors`` vectors of width h."""

    def __init__(self, config: W1Config, num_vectors: int) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = nn.Linear(config.condition_size, num_vectors * config.hidden_size)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(condition)).chunk(self.num_vectors, dim=-1)


class W1Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: W1Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)
        self.q_norm = W1RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = W1RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention's output [b, l, h] for hidden [b, l, h], cos and sin [b, 1, l, r] and mask, bool [b, 1, l, l]."""
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        blind = None if mask is None else ~mask.any(dim=-1, keepdim=True)
        # Some kernels give NaN for a row that sees no key. Such a row sees all keys here, and its output is set to zero.
        visible = None if mask is None else mask | blind
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=query.shape[1] != key.shape[1])
        if blind is not None:
            output = output.masked_fill(blind, 0.0)
        return self.o_proj(output.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary position embedding to the first r channels of x, [b, n, l, d], in the half-split layout."""
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([x * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def rotary_frequencies(config: W1Config, device: torch.device) -> Tensor:
    """Return the radians per position of each pair of channels, float32 [r / 2]; "llama3" divides the low frequencies."""
    channels = config.rotary_channels or config.head_dim
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if not scaling or scaling.get("rope_type", "default") == "default":
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


class W1MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=False)
        self.up_proj = nn.Linear(hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the output of x, [..., h]; with weights [..., 1] times these."""
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner if weights is None else (inner * weights).to(x.dtype))


class W1Router(nn.Module):
    """The choice of experts of each token, and their weights."""

    def __init__(self, hidden_size: int, experts: dict[str, Any]) -> None:
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts["num_experts"], hidden_size))
        if experts["has_bias"]:
            # A parameter, because a model in bfloat16 keeps only named parameters in float32. A rounded bias would choose other experts.
            self.expert_bias = nn.Parameter(torch.zeros(experts["num_experts"], dtype=torch.float32), requires_grad=False)
        else:
            self.expert_bias = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers and the weights of each token's experts, int64 and float32 [t, k], for x, [t, h]."""
        settings = self.experts
        num_active, is_sigmoid = settings["num_active"], settings["score"] == "sigmoid"
        dtype = torch.float32 if settings["router_precision"] == "fp32" else x.dtype
        logits = F.linear(x.to(dtype), self.weight.to(dtype)).float()
        # A softmax over the chosen logits is the softmax over all logits, divided by the sum of the chosen ones.
        chosen_first = not is_sigmoid and settings["normalize"] and num_active > 1
        scores = logits.sigmoid() if is_sigmoid else logits if chosen_first else logits.softmax(dim=-1)
        order = scores if self.expert_bias is None else scores + self.expert_bias
        chosen = _in_best_groups(order, settings).topk(num_active, dim=-1).indices
        weights = scores.gather(1, chosen)
        if chosen_first:
            weights = weights.softmax(dim=-1)
        elif is_sigmoid and num_active > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, weights * settings["scale"]


def _in_best_groups(order: Tensor, settings: dict[str, Any]) -> Tensor:
    """Return the order of experts, [t, E], with minus infinity for the experts outside of each token's best groups."""
    if settings["num_groups"] == 1:
        return order
    grouped = order.unflatten(1, (settings["num_groups"], -1))
    num_best = settings["num_active"] // settings["num_active_groups"]
    best = grouped.topk(num_best, dim=-1).values.sum(dim=-1).topk(settings["num_active_groups"], dim=-1).indices
    is_best = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=order.device).scatter(1, best, True)
    return grouped.masked_fill(~is_best[..., None], float("-inf")).flatten(1)


class W1Experts(nn.Module):
    """A mixture of experts: each token is computed by some of them, and by the shared expert if there is one."""

    def __init__(self, hidden_size: int, settings: dict[str, Any]) -> None:
        super().__init__()
        self.gate = W1Router(hidden_size, settings)
        self.experts = nn.ModuleList([W1MLP(hidden_size, settings["ffn_hidden_size"]) for _ in range(settings["num_experts"])])
        shared = settings["shared_ffn_hidden_size"]
        self.shared_experts = W1MLP(hidden_size, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen, weights = self.gate(tokens)
        output = torch.zeros_like(tokens) if self.shared_experts is None else self.shared_experts(tokens)
        for number, expert in enumerate(self.experts):
            rows, column = (chosen == number).nonzero(as_tuple=True)
            output = output.index_add(0, rows, expert(tokens[rows], weights[rows, column, None]))
        return output.view_as(x)


class W1Layer(nn.Module):
    """Attention and MLP, which the condition modulates if the model has one."""

    def __init__(self, config: W1Config, number: int) -> None:
        super().__init__()
        self.input_layernorm = W1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = W1Attention(config)
        self.post_attention_layernorm = W1RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.experts is None or number < config.experts["num_dense_layers"]:
            self.mlp: nn.Module = W1MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = W1Experts(config.hidden_size, config.experts)
        self.modulation = W1Modulation(config, 6) if config.conditioning == "adaln" else None

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, condition: Tensor | None) -> Tensor:
        if self.modulation is None:
            hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, mask)
            return hidden + self.mlp(self.post_attention_layernorm(hidden))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)
        normed = self.input_layernorm(hidden) * (1 + scale_a) + shift_a
        hidden = hidden + gate_a * self.self_attn(normed, cos, sin, mask)
        normed = self.post_attention_layernorm(hidden) * (1 + scale_m) + shift_m
        return hidden + gate_m * self.mlp(normed)


class W1Transformer(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: W1Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([W1Layer(config, number) for number in range(config.num_hidden_layers)])
        self.norm = W1RMSNorm(config.hidden_size, config.rms_norm_eps)
        conditioned = config.conditioning == "adaln"
        self.timestep_embedding = W1TimestepEmbedding(config) if conditioned else None
        self.final_modulation = W1Modulation(config, 2) if conditioned else None

    def forward(self, input_ids: Tensor, positions: Tensor, mask: Tensor | None, timesteps: Tensor) -> Tensor:
        """Return hidden states [b, l, h] for int ids and positions [b, l], a bool mask [b, 1, l, l] and float timesteps [b, 1 or l]."""
        hidden = self.embed_tokens(input_ids)
        angles = positions.float()[:, None, :, None] * rotary_frequencies(self.config, input_ids.device)
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
        condition = None if self.timestep_embedding is None else self.timestep_embedding(timesteps)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, mask, condition)
        hidden = self.norm(hidden)
        if self.final_modulation is not None:
            shift, scale = self.final_modulation(condition)
            hidden = hidden * (1 + scale) + shift
        return hidden


class W1ForMaskedDiffusion(PreTrainedModel):
    """A model that maps noised tokens to the logits of the clean token at each position, also where the network's outputs are shifted."""

    config_class = W1Config
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["W1Layer"]  # noqa: RUF012 - transformers expects a list
    _keep_in_fp32_modules_strict = {"expert_bias"}  # noqa: RUF012 - transformers expects a set

    def __init__(self, config: W1Config) -> None:
        super().__init__(config)
        self.model = W1Transformer(config)
        # A tied head is no module but the embedding's weight, so that no version's rules for tying matter.
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        timesteps: Tensor | None = None,
        **_unused: Any,
    ) -> MaskedLMOutput:
        """Return the logits, [b, l, v], in ``.logits``. The logits at a position are those of the clean token of this position.

        With ``config.block_size``, blocks are counted from position 0, and a block is noisy if it has a mask token. The logits are those of
        training up to the first noisy block, which may hold any share of masks. Blocks after it see its mask tokens, which training
        never shows: fill the blocks in their order. A row may hold several documents: a document begins where ``position_ids`` restart, and
        sees no other document. Without ``config.block_size``, such rows need ``attention_mask`` and ``timesteps``.

        With ``config.shift``, the logits of the first token of a document (position 0) come from its own position, because no output is
        trained to predict this token.

        Args:
            input_ids: int [b, l].
            attention_mask: None (every token sees all tokens, or those of its own and earlier blocks), [b, l] (1 = real token, 0 = padding,
                which no token sees), or bool [b, l, l] or [b, 1, l, l] (True: the token of the row sees the token of the column), which is
                used as it is, also in block diffusion.
            position_ids: int [b, l] or [1, l], position inside the document; None = the number of real tokens before each token.
            timesteps: t in [0, 1], which equals the mask probability only in linear masking, float [b] (of the whole sample, or of its
                noisy blocks: clean blocks are at 0) or [b, l]; None = the share of mask tokens among the real tokens of a sample or of a
                block. Without conditioning it has no effect.

        Raises:
            ValueError: a forward pass over one copy of the tokens cannot give training's outputs, and ``attention_mask`` has no rows.
        """
        is_given = attention_mask is not None and attention_mask.dim() > 2
        real = torch.ones_like(input_ids) if attention_mask is None or is_given else attention_mask
        if position_ids is None:
            position_ids = (real.long().cumsum(dim=1) - 1).clamp_min(0)
        position_ids = position_ids.expand_as(input_ids)
        shares = self._mask_shares(input_ids, position_ids, real.bool())
        if timesteps is None:
            timesteps = shares
        elif timesteps.dim() == 1:
            timesteps = timesteps[:, None] if self.config.block_size is None else timesteps[:, None] * (shares > 0)
        mask = _visible(attention_mask)
        if self.config.block_size is not None and not is_given:
            # Padding may be alone in its document, and a row of attention that sees no token is NaN.
            blocks = self._block_mask(position_ids, shares > 0) | ~real.bool()[:, None, :, None]
            mask = blocks if mask is None else mask & blocks
        hidden = self.model(input_ids, position_ids, mask, timesteps)
        if self.config.shift:
            before = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
            hidden = torch.where((position_ids == 0)[..., None], hidden, before)
        logits = F.linear(hidden, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)
        if self.config.exclude_mask_logit and self.config.mask_token_id is not None:
            logits[..., self.config.mask_token_id] = float("-inf")
        return MaskedLMOutput(logits=logits)

    def _mask_shares(self, input_ids: Tensor, positions: Tensor, real: Tensor) -> Tensor:
        """Return the share of mask tokens among the real tokens of each sample, float32 [b, 1], or of each token's block, [b, l]."""
        if self.config.prediction == "next_token":
            # Training has no noise, and a mask token in the text is a token like others.
            return torch.zeros(input_ids.shape, device=input_ids.device)
        masked = (input_ids == self.config.mask_token_id) & real
        if self.config.block_size is None:
            return masked.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp_min(1)
        block = positions // self.config.block_size
        same = (block[:, :, None] == block[:, None, :]) & _same_document(positions)
        return (same & masked[:, None, :]).sum(dim=2) / (same & real[:, None, :]).sum(dim=2).clamp_min(1)

    def _block_mask(self, positions: Tensor, is_noisy: Tensor) -> Tensor:
        """Return what each token sees of its document, bool [b, 1, l, l]: earlier blocks, and of its own block all or up to itself."""
        config = self.config
        clean_sees_all, noisy_sees_all = config.clean_attention == "block_causal", config.noisy_attention == "bidirectional"
        if config.shift and config.block_size > 1 and clean_sees_all != noisy_sees_all:
            raise ValueError(
                f"with shift, clean_attention={config.clean_attention} and noisy_attention={config.noisy_attention}, the output that "
                "predicts a block's first token is of a noisy copy of the clean block before it: give attention_mask of shape [b, l, l], "
                "and input_ids that have this copy"
            )
        block = positions // config.block_size
        sees_all = torch.where(is_noisy, noisy_sees_all, clean_sees_all)[:, :, None]
        own = (block[:, None, :] == block[:, :, None]) & (sees_all | (positions[:, None, :] <= positions[:, :, None]))
        return (_same_document(positions) & ((block[:, None, :] < block[:, :, None]) | own))[:, None]


def _same_document(positions: Tensor) -> Tensor:
    """Return whether two tokens of a row are of one document, bool [b, l, l]. Documents begin at position 0, or where positions go back."""
    before = torch.cat([positions[:, :1], positions[:, :-1]], dim=1)
    document = ((positions == 0) | (positions < before)).cumsum(dim=1)
    return document[:, :, None] == document[:, None, :]


def _visible(attention_mask: Tensor | None) -> Tensor | None:
    """Return the mask as bool [b, 1, 1 or l, l]; None if every token sees all tokens."""
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    if mask.dim() == 2:
        # No token sees padding; padding itself sees the same tokens as real tokens do.
        return None if bool(mask.all()) else mask[:, None, None, :]
    return mask[:, None] if mask.dim() == 3 else mask
