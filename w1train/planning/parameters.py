"""Every parameter of a pipeline chunk in closed form: names, local shapes, and order, as the model registers them.

The order decides the place of a parameter in megatron-core's flat buffers, so it is part of the byte-exact prediction; a test
compares it with the built model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from w1train.config.schema import ModelConfig
from w1train.config.schema_adapters import LORA_A, LORA_B, AdaptersConfig, is_adapted, is_trained
from w1train.engine.matrices import is_matrix
from w1train.model.flops import NO_ADAPTERS, num_expert_layers, num_parameters
from w1train.planning.layout import Chunk, Layout


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as a rank holds it."""

    name: str
    """Name in the whole model, in which layers are numbered."""
    shape: tuple[int, ...]
    """Shape on one rank."""
    is_split: bool = False
    """True: the parameter is split over tensor-parallel ranks, or over the ranks of the experts. False: each rank has the whole
    parameter."""
    is_expert: bool = False
    """True: the parameter has matrices of routed experts, whose ranks and buffers are not those of the other parameters."""
    has_own_bucket: bool = False
    """True: its gradient is also summed over pipeline ranks, and megatron-core keeps it in a bucket of its own."""
    is_trained: bool = True
    """False: the parameter is frozen, so it has neither a gradient nor optimizer states."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Widths:
    """Sizes of the attention's parts over all heads."""

    channels: int
    query: int
    key: int
    """Width of all keys together; values are as wide."""


def widths(model: ModelConfig) -> Widths:
    """Return the channels of a head, and the widths of all queries and of all keys."""
    channels = model.kv_channels or model.hidden_size // model.num_attention_heads
    return Widths(channels, model.num_attention_heads * channels, (model.num_query_groups or model.num_attention_heads) * channels)


class Slices(NamedTuple):
    """The numbers of ranks that share a layer."""

    tensor: int
    expert: int
    expert_tensor: int


def num_matrix_elements(model: ModelConfig) -> int:
    """Return the elements of the matrices that Muon updates."""
    whole = (parameter for layer in range(model.num_layers) for parameter in _layer(model, layer, Slices(1, 1, 1)))
    return sum(parameter.numel for parameter in whole if is_matrix(parameter.name))


def num_trained_parameters(model: ModelConfig, adapters: AdaptersConfig) -> int:
    """Return the number of parameters of the whole model that have gradients."""
    if not adapters.rank:
        return num_parameters(model)
    chunk = Chunk(0, 0, model.num_layers, num_expert_layers(model), has_embedding=True, has_head=True)
    whole = _with_adapters(_base_parameters(model, Slices(1, 1, 1), chunk, in_pipeline=False), adapters, model.num_layers)
    return sum(parameter.numel for parameter in whole if parameter.is_trained)


def chunk_parameters(model: ModelConfig, layout: Layout, chunk: Chunk, adapters: AdaptersConfig = NO_ADAPTERS) -> list[Parameter]:
    """Return the parameters of a chunk in the order of ``named_parameters``."""
    slices = Slices(layout.tensor, layout.expert, layout.expert_tensor)
    base = _base_parameters(model, slices, chunk, in_pipeline=layout.pipeline > 1)
    return list(_with_adapters(base, adapters, model.num_layers)) if adapters.rank else base


def _with_adapters(base: list[Parameter], adapters: AdaptersConfig, num_layers: int) -> Iterator[Parameter]:
    """Yield the parameters of the base, most of them frozen, with the adapters behind the parameters of their linear layers."""
    for place, parameter in enumerate(base):
        yield replace(parameter, is_trained=_is_trained(parameter.name, adapters, num_layers))
        linear = parameter.name.rpartition(".")[0]
        is_last = place + 1 == len(base) or base[place + 1].name.rpartition(".")[0] != linear
        if is_last and is_adapted(_in_layer(linear), adapters):
            rows, columns = next(each.shape for each in base if each.name == f"{linear}.weight")
            is_column = linear.endswith(("linear_qkv", "linear_fc1"))
            yield Parameter(linear + LORA_A, (adapters.rank, columns), is_split=not is_column)
            yield Parameter(linear + LORA_B, (rows, adapters.rank), is_split=is_column)


def _in_layer(name: str) -> str:
    return re.sub(r"^decoder\.layers\.\d+\.", "", name)


def _is_trained(name: str, adapters: AdaptersConfig, num_layers: int) -> bool:
    """Tell whether a parameter has a gradient: if it is trained in one layer, it has a gradient in all layers
    (``w1train.engine.rate_multipliers``)."""
    inside = _in_layer(name)
    names = [name] if inside == name else (f"decoder.layers.{layer}.{inside}" for layer in range(num_layers))
    return any(is_trained(each, adapters) for each in names)


def _base_parameters(model: ModelConfig, slices: Slices, chunk: Chunk, *, in_pipeline: bool) -> list[Parameter]:
    """Return the parameters of a chunk without adapters."""
    vocabulary = (model.vocab_size // slices.tensor, model.hidden_size)
    embedding = "embedding.word_embeddings.weight"
    tied_apart = model.tie_embeddings and in_pipeline
    parameters = [Parameter(embedding, vocabulary, True, has_own_bucket=tied_apart)] if chunk.has_embedding else []
    if model.conditioning == "adaln":
        parameters += _timestep_embedding(model, in_pipeline=in_pipeline)
    for layer in range(chunk.first_layer, chunk.first_layer + chunk.num_layers):
        parameters += _layer(model, layer, slices)
    if chunk.has_head:
        if model.learns_noise_rates:
            parameters.append(Parameter("noise_rates.unconstrained", (model.vocab_size,)))
        parameters.append(Parameter("final_norm.weight", (model.hidden_size,)))
        if model.conditioning == "adaln":
            parameters += _linear("final_modulation.linear.", 2 * model.hidden_size, model.condition_size)
        if not model.tie_embeddings:
            parameters.append(Parameter("output_layer.weight", vocabulary, True))
        elif not chunk.has_embedding:
            # The last stage's copy of the embedding.
            parameters.append(Parameter(embedding, vocabulary, True, has_own_bucket=tied_apart))
    return parameters


def _timestep_embedding(model: ModelConfig, in_pipeline: bool) -> Iterator[Parameter]:
    """Yield the parameters of the timestep embedding, which every chunk has because every layer is modulated."""
    yield from _linear("timestep_embedding.linear_in.", model.condition_size, model.timestep_frequency_size, in_pipeline)
    yield from _linear("timestep_embedding.linear_out.", model.condition_size, model.condition_size, in_pipeline)


def _layer(model: ModelConfig, layer: int, slices: Slices) -> Iterator[Parameter]:
    hidden, tensor, width = model.hidden_size, slices.tensor, widths(model)
    prefix = f"decoder.layers.{layer}."
    yield Parameter(prefix + "input_layernorm.weight", (hidden,))
    yield Parameter(prefix + "self_attention.linear_proj.weight", (hidden, width.query // tensor), True)
    yield Parameter(prefix + "self_attention.linear_qkv.weight", ((width.query + 2 * width.key) // tensor, hidden), True)
    if model.qkv_bias:
        yield Parameter(prefix + "self_attention.linear_qkv.bias", ((width.query + 2 * width.key) // tensor,), True)
    if model.qk_norm:
        yield Parameter(prefix + "self_attention.q_layernorm.weight", (width.channels,))
        yield Parameter(prefix + "self_attention.k_layernorm.weight", (width.channels,))
    yield Parameter(prefix + "pre_mlp_layernorm.weight", (hidden,))
    if layer < model.num_layers - num_expert_layers(model):
        yield from _swiglu(prefix + "mlp.", hidden, model.ffn_hidden_size // tensor)
    else:
        yield from _experts(model, prefix + "mlp.", slices)
    if model.conditioning == "adaln":
        yield from _linear(prefix + "modulation.linear.", 6 * hidden, model.condition_size)


def _swiglu(prefix: str, hidden: int, inner: int) -> Iterator[Parameter]:
    yield Parameter(prefix + "linear_fc1.weight", (2 * inner, hidden), True)
    yield Parameter(prefix + "linear_fc2.weight", (hidden, inner), True)


def _experts(model: ModelConfig, prefix: str, slices: Slices) -> Iterator[Parameter]:
    """Yield the parameters of the router, of a rank's routed experts, and of the shared expert."""
    hidden, experts = model.hidden_size, model.experts
    num_local, inner = experts.num_experts // slices.expert, experts.ffn_hidden_size // slices.expert_tensor
    yield Parameter(prefix + "router.weight", (experts.num_experts, hidden))
    yield Parameter(prefix + "experts.linear_fc1.weight", (num_local, 2, inner, hidden), True, is_expert=True)
    yield Parameter(prefix + "experts.linear_fc2.weight", (num_local, hidden, inner), True, is_expert=True)
    if experts.shared_ffn_hidden_size:
        yield from _swiglu(prefix + "shared_experts.", hidden, experts.shared_ffn_hidden_size // slices.tensor)


def _linear(prefix: str, rows: int, columns: int, has_own_bucket: bool = False) -> Iterator[Parameter]:
    """Yield the parameters of a replicated linear layer with a bias."""
    yield Parameter(prefix + "weight", (rows, columns), has_own_bucket=has_own_bucket)
    yield Parameter(prefix + "bias", (rows,), has_own_bucket=has_own_bucket)
