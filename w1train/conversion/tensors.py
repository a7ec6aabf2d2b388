"""The stored tensors of which each parameter of the model is made.

A *part* is a number of consecutive rows of a stored tensor. A parameter consists of its parts, interleaved by group. megatron-core's
projection to queries, keys and values has for each query group the queries, the key and the value of that group, so that the rows of a
tensor-parallel rank are whole groups. SwiGLU's first matrix has the gate and then the other half, and a rank has a part of both. Every
other parameter is one tensor. Tensor parallelism along rows splits each part evenly, whatever the number of groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from w1train.config.schema import ModelConfig

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows of a stored tensor."""

    tensor: str
    start: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the whole model, and the stored tensors that hold it."""

    name: str
    """Name as in ``global_named_parameters``."""
    shape: tuple[int, ...]
    """Shape of the whole parameter, without tensor parallelism."""
    parts: tuple[Part, ...]
    num_groups: int = 1

    @property
    def is_conditioning(self) -> bool:
        """Tell whether the parameter belongs to the timestep input, which autoregressive models do not have."""
        return "modulation." in self.name or self.name.startswith("timestep_embedding.")

    @property
    def is_vocabulary(self) -> bool:
        """Tell whether the parameter has one row for each token."""
        return self.name in (EMBEDDING, HEAD)


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the whole model, in the order of its layers."""
    channels = model.kv_channels or model.hidden_size // model.num_attention_heads
    query = model.num_attention_heads * channels
    query_key_value = query + 2 * (model.num_query_groups or model.num_attention_heads) * channels
    hidden, conditioned = model.hidden_size, model.conditioning == "adaln"
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    layer["self_attention.linear_qkv.weight"] = (query_key_value, hidden)
    if model.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = (query_key_value,)
    if model.qk_norm:
        layer["self_attention.q_layernorm.weight"] = layer["self_attention.k_layernorm.weight"] = (channels,)
    layer["self_attention.linear_proj.weight"] = (hidden, query)
    layer["pre_mlp_layernorm.weight"] = (hidden,)
    layer["mlp.linear_fc1.weight"] = (2 * model.ffn_hidden_size, hidden)
    layer["mlp.linear_fc2.weight"] = (hidden, model.ffn_hidden_size)
    if conditioned:
        layer |= _linear("modulation.linear", 6 * hidden, model.condition_size)
    whole: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, hidden)}
    if conditioned:
        whole |= _linear("timestep_embedding.linear_in", model.condition_size, model.timestep_frequency_size)
        whole |= _linear("timestep_embedding.linear_out", model.condition_size, model.condition_size)
    whole |= {f"decoder.layers.{number}.{name}": shape for number in range(model.num_layers) for name, shape in layer.items()}
    if model.learns_noise_rates:
        whole["noise_rates.unconstrained"] = (model.vocab_size,)
    whole["final_norm.weight"] = (hidden,)
    if conditioned:
        whole |= _linear("final_modulation.linear", 2 * hidden, model.condition_size)
    if not model.tie_embeddings:
        whole[HEAD] = (model.vocab_size, hidden)
    return whole


def _linear(prefix: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": (rows, columns), f"{prefix}.bias": (rows,)}


def checkpoint_parameters(model: ModelConfig) -> Iterator[Parameter]:
    """Yield parameters as checkpoints of w1train store them: each parameter is one tensor."""
    for name, shape in shapes(model).items():
        rows = shape[0]
        halves = 2 if name.endswith("linear_fc1.weight") else 1
        parts = tuple(Part(name, half * rows // halves, rows // halves) for half in range(halves))
        yield Parameter(name, shape, parts)


_SAME_OUTSIDE = {
    EMBEDDING: "model.embed_tokens.weight",
    HEAD: "lm_head.weight",
    "final_norm.weight": "model.norm.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc2": "mlp.down_proj",
    "modulation.linear": "modulation.linear",
}


def hugging_face_parameters(model: ModelConfig) -> Iterator[Parameter]:
    """Yield parameters as Llama, Qwen2 and Qwen3 store them in Hugging Face files; parameters of adaLN have this project's names."""
    num_groups = model.num_query_groups or model.num_attention_heads
    channels = model.kv_channels or model.hidden_size // model.num_attention_heads
    heads = {"q_proj": model.num_attention_heads, "k_proj": num_groups, "v_proj": num_groups}
    fused = {
        "self_attention.linear_qkv": ("self_attn", heads, channels),
        "mlp.linear_fc1": ("mlp", {"gate_proj": 1, "up_proj": 1}, model.ffn_hidden_size),
    }
    for name, shape in shapes(model).items():
        layer = _LAYER.fullmatch(name)
        if layer is None:
            yield Parameter(name, shape, (Part(_SAME_OUTSIDE.get(name, f"model.{name}"), 0, shape[0]),))
            continue
        prefix, (module, _, kind) = f"model.layers.{layer.group(1)}", layer.group(2).rpartition(".")
        if module not in fused:
            yield Parameter(name, shape, (Part(f"{prefix}.{_LAYER_NAMES[module]}.{kind}", 0, shape[0]),))
            continue
        parent, pieces, size = fused[module]
        parts = tuple(Part(f"{prefix}.{parent}.{piece}.{kind}", 0, count * size) for piece, count in pieces.items())
        yield Parameter(name, shape, parts, num_groups if module.endswith("qkv") else 1)
