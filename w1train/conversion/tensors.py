"""The stored tensors of which each parameter of the model is made.

A *part* is a number of consecutive rows of a stored tensor. A parameter consists of its parts, interleaved by group. megatron-core's
projection to queries, keys and values has for each query group the queries, the key and the value of that group, so that the rows of a
tensor-parallel rank are whole groups. SwiGLU's first matrix has the gate and then the other half, and a rank has a part of both. Every
other parameter is one tensor. Tensor parallelism along rows splits each part evenly, whatever the number of groups.

The matrices of each routed expert are parameters of their own here, ``decoder.layers.3.mlp.experts.5.linear_fc1.weight``, although the
model and its checkpoints have those of all experts of a layer in one tensor.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from w1train.config.schema import ModelConfig
from w1train.config.schema_adapters import LORA_A, LORA_B, AdaptersConfig, is_adapted
from w1train.model.flops import NO_ADAPTERS, linear_sizes, num_expert_layers

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
EXPERT_BIAS = ".expert_bias"
"""The end of the names of the numbers that balance experts, which stay in fp32 whatever the type of the weights."""
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


def shapes(model: ModelConfig, adapters: AdaptersConfig = NO_ADAPTERS) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the whole model, in the order of its layers, and then those of adapters."""
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
    modulation = _linear("modulation.linear", 6 * hidden, model.condition_size) if conditioned else {}
    whole: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, hidden)}
    if conditioned:
        whole |= _linear("timestep_embedding.linear_in", model.condition_size, model.timestep_frequency_size)
        whole |= _linear("timestep_embedding.linear_out", model.condition_size, model.condition_size)
    num_dense = model.experts.num_dense_layers if model.experts.num_experts else model.num_layers
    for number in range(model.num_layers):
        mlp = _swiglu("mlp", hidden, model.ffn_hidden_size) if number < num_dense else _experts(model)
        whole |= {f"decoder.layers.{number}.{name}": shape for name, shape in (layer | mlp | modulation).items()}
    if model.learns_noise_rates:
        whole["noise_rates.unconstrained"] = (model.vocab_size,)
    whole["final_norm.weight"] = (hidden,)
    if conditioned:
        whole |= _linear("final_modulation.linear", 2 * hidden, model.condition_size)
    if not model.tie_embeddings:
        whole[HEAD] = (model.vocab_size, hidden)
    return whole | adapter_shapes(model, adapters)


def adapter_shapes(model: ModelConfig, adapters: AdaptersConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices of all adapters."""
    num_dense = model.num_layers - num_expert_layers(model)
    found: dict[str, tuple[int, ...]] = {}
    for name, size in linear_sizes(model).items():
        if is_adapted(name, adapters):
            first = num_dense if name.startswith("mlp.shared_experts.") else 0
            for layer in range(first, first + size.num_layers):
                prefix = f"decoder.layers.{layer}.{name}"
                found |= {prefix + LORA_A: (adapters.rank, size.inputs), prefix + LORA_B: (size.outputs, adapters.rank)}
    return found


def _experts(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    experts, hidden = model.experts, model.hidden_size
    layer: dict[str, tuple[int, ...]] = {"mlp.router.weight": (experts.num_experts, hidden)}
    if experts.has_bias:
        layer[f"mlp.router{EXPERT_BIAS}"] = (experts.num_experts,)
    for expert in range(experts.num_experts):
        layer |= _swiglu(f"mlp.experts.{expert}", hidden, experts.ffn_hidden_size)
    if experts.shared_ffn_hidden_size:
        layer |= _swiglu("mlp.shared_experts", hidden, experts.shared_ffn_hidden_size)
    return layer


def _swiglu(prefix: str, hidden_size: int, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.linear_fc1.weight": (2 * size, hidden_size), f"{prefix}.linear_fc2.weight": (hidden_size, size)}


def _linear(prefix: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": (rows, columns), f"{prefix}.bias": (rows,)}


def checkpoint_parameters(model: ModelConfig, adapters: AdaptersConfig = NO_ADAPTERS) -> Iterator[Parameter]:
    """Yield parameters as checkpoints of w1train store them: each parameter is one tensor."""
    for name, shape in shapes(model, adapters).items():
        rows = shape[0]
        halves = 2 if name.endswith(("linear_fc1.weight", f"linear_fc1{LORA_B}")) else 1
        parts = tuple(Part(name, half * rows // halves, rows // halves) for half in range(halves))
        yield Parameter(name, shape, parts)


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The names of a model family's tensors in Hugging Face files, as far as families differ."""

    embedding: str = "embed_tokens"
    attention: str = "self_attn"
    output: str = "o_proj"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    query_key_value: str | None = None
    """One tensor with the rows of all queries, then all keys, then all values; None = a tensor for each."""

    def module(self, name: str) -> str:
        """Return the name of a module of a layer that is one tensor in the files."""
        names = {
            "self_attention.linear_proj": f"{self.attention}.{self.output}",
            "self_attention.q_layernorm": f"{self.attention}.{self.query_norm}",
            "self_attention.k_layernorm": f"{self.attention}.{self.key_norm}",
            "pre_mlp_layernorm": "post_attention_layernorm",
            "mlp.router": "mlp.gate",
        }
        return names.get(name, name.replace("linear_fc2", "down_proj"))


LLAMA_NAMES = TensorNames()
LING_NAMES = TensorNames("word_embeddings", "attention", "dense", "query_layernorm", "key_layernorm", "query_key_value")


def hugging_face_parameters(model: ModelConfig, names: TensorNames = LLAMA_NAMES) -> Iterator[Parameter]:
    """Yield parameters as Hugging Face files of a family store them; parameters of adaLN have this project's names."""
    outside = {EMBEDDING: f"model.{names.embedding}.weight", HEAD: "lm_head.weight", "final_norm.weight": "model.norm.weight"}
    num_groups = model.num_query_groups or model.num_attention_heads
    for name, shape in shapes(model).items():
        layer = _LAYER.fullmatch(name)
        if layer is None:
            yield Parameter(name, shape, (Part(outside.get(name, f"model.{name}"), 0, shape[0]),))
            continue
        prefix, (module, _, kind) = f"model.layers.{layer.group(1)}.", layer.group(2).rpartition(".")
        if module.endswith("linear_qkv"):
            yield Parameter(name, shape, _query_key_value(model, names, prefix, kind), num_groups)
        elif module.endswith("linear_fc1"):
            parent, half = prefix + module.removesuffix("linear_fc1"), shape[0] // 2
            yield Parameter(name, shape, tuple(Part(f"{parent}{piece}.{kind}", 0, half) for piece in ("gate_proj", "up_proj")))
        else:
            yield Parameter(name, shape, (Part(f"{prefix}{names.module(module)}.{kind}", 0, shape[0]),))


def _query_key_value(model: ModelConfig, names: TensorNames, prefix: str, kind: str) -> tuple[Part, ...]:
    """Return the queries, keys and values of a layer: three tensors, or rows of one tensor."""
    num_groups = model.num_query_groups or model.num_attention_heads
    channels = model.kv_channels or model.hidden_size // model.num_attention_heads
    rows = {"q_proj": model.num_attention_heads * channels, "k_proj": num_groups * channels, "v_proj": num_groups * channels}
    prefix += f"{names.attention}."
    if names.query_key_value is None:
        return tuple(Part(f"{prefix}{piece}.{kind}", 0, count) for piece, count in rows.items())
    starts = itertools.accumulate(rows.values(), initial=0)
    return tuple(Part(f"{prefix}{names.query_key_value}.{kind}", start, count) for start, count in zip(starts, rows.values(), strict=False))
