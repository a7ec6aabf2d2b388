"""Model FLOPs and parameters in closed form.

Only the matrix products that training must compute are counted, each with 2mnk FLOPs: attention over visible pairs, the whole token stream
(2L in block diffusion), logits only where a loss is taken, adaLN once for each segment, and of a mixture of experts those experts that
compute a token. A frozen matrix has no gradient, so it takes two products instead of three. Recomputed activations, tiles that the mask
hides and element-wise work are not counted, because an MFU that counted them would be too high.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import NamedTuple

from w1train.config.schema import ModelConfig
from w1train.config.schema_adapters import AdaptersConfig, is_adapted, is_trained, linear_names

_FORWARD_AND_BACKWARD = 3
"""The backward pass takes two products of the size of the forward pass's: the gradients of the input and of the weight."""


@dataclass(frozen=True, slots=True)
class FlopsByPart:
    """FLOPs of the forward passes and the backward pass of a step, over all layers."""

    attention_projections: int
    """Query, key, value and output projections."""
    attention_core: int
    """Scores and weighted values, over visible pairs."""
    mlp: int
    """The three matrices of SwiGLU, in layers without experts."""
    router: int
    """The products that give the logits of the experts."""
    experts: int
    """The SwiGLUs of the routed experts. No token is dropped, so the number does not depend on the balance of the experts."""
    shared_experts: int
    """The SwiGLU that computes every token of a layer with experts."""
    adaln: int
    """The products that make modulations of the condition: six vectors for each layer and two before the head, for each segment."""
    timestep_mlp: int
    """The products that make the condition of the sinusoid, for each segment."""
    output_head: int
    """The matrix product from hidden states to logits."""
    adapters: int
    """The products with the matrices of low-rank adapters."""

    @property
    def total(self) -> int:
        return sum(astuple(self))


class LinearSizes(NamedTuple):
    """The sizes of a linear layer that can have an adapter, without tensor parallelism."""

    inputs: int
    outputs: int
    num_layers: int
    """Layers of the Transformer that have it."""


def linear_sizes(model: ModelConfig) -> dict[str, LinearSizes]:
    """Return the sizes of the linear layers that can have adapters, by their names inside a layer of the Transformer."""
    query, key_value = _attention_sizes(model)
    hidden, num_routed = model.hidden_size, num_expert_layers(model)
    sizes = {
        "self_attention.linear_qkv": LinearSizes(hidden, query + 2 * key_value, model.num_layers),
        "self_attention.linear_proj": LinearSizes(query, hidden, model.num_layers),
    }
    of_mlps = (
        ("mlp", model.ffn_hidden_size, model.num_layers - num_routed),
        ("mlp.shared_experts", model.experts.shared_ffn_hidden_size, num_routed),
    )
    for mlp, inner, num_layers in of_mlps:
        sizes[f"{mlp}.linear_fc1"] = LinearSizes(hidden, 2 * inner, num_layers)
        sizes[f"{mlp}.linear_fc2"] = LinearSizes(inner, hidden, num_layers)
    return {name: sizes[name] for name in linear_names(model)}


def num_adapter_parameters(model: ModelConfig, adapters: AdaptersConfig) -> int:
    """Return the number of parameters of all adapters."""
    adapted = (size for name, size in linear_sizes(model).items() if is_adapted(name, adapters))
    return sum(size.num_layers * adapters.rank * (size.inputs + size.outputs) for size in adapted)


NO_ADAPTERS = AdaptersConfig()


def model_flops(
    model: ModelConfig,
    *,
    num_tokens: int,
    visible_pairs: int,
    num_logits: int,
    num_segments: int,
    adapters: AdaptersConfig = NO_ADAPTERS,
    num_measuring_passes: int = 0,
) -> FlopsByPart:
    """Return the FLOPs of training on some tokens, forward and backward.

    Args:
        num_tokens: positions that pass through the layers; block diffusion has two for each token of data.
        visible_pairs: (query, key) pairs of which the query sees the key, in one layer, summed over samples. One sequence
            of L tokens with full attention has L * L.
        num_logits: positions whose logits are computed.
        num_segments: stretches of tokens that share a timestep, summed over samples.
        adapters: the adapters, with which the base is frozen.
        num_measuring_passes: forward passes without a backward pass, for an objective that needs sums of models' outputs first.
    """

    def of_matrix(name: str, multiply_adds: int) -> int:
        return 2 * multiply_adds * (2 + _is_trained(name, model, adapters) + num_measuring_passes)

    def of_swiglu(mlp: str, multiply_adds: int) -> int:
        return of_matrix(f"*.{mlp}.linear_fc1.weight", 2 * multiply_adds) + of_matrix(f"*.{mlp}.linear_fc2.weight", multiply_adds)

    num_products = _FORWARD_AND_BACKWARD + num_measuring_passes
    query_size, key_value_size = _attention_sizes(model)
    hidden, condition = model.hidden_size, model.condition_size
    experts, num_routed = model.experts, num_expert_layers(model) * num_tokens
    has_adaln = model.conditioning == "adaln"
    modulation = condition * hidden * (6 * model.num_layers + 2)
    learns_condition = _is_trained("timestep_embedding.linear_in.weight", model, adapters)
    # The sinusoid needs no gradient, so the first timestep matrix has two products instead of three.
    num_forward = 1 + num_measuring_passes
    timestep = num_forward * (model.timestep_frequency_size + condition) * condition
    timestep += (model.timestep_frequency_size + 2 * condition) * condition if learns_condition else 0
    modulation_products = num_forward + _is_trained("*.modulation.linear.weight", model, adapters) + learns_condition
    in_layers, num_dense = model.num_layers * num_tokens * hidden, model.num_layers * num_tokens - num_routed
    head = "embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"
    return FlopsByPart(
        attention_projections=of_matrix("*.self_attention.linear_qkv.weight", in_layers * (query_size + 2 * key_value_size))
        + of_matrix("*.self_attention.linear_proj.weight", in_layers * query_size),
        attention_core=2 * num_products * model.num_layers * visible_pairs * 2 * query_size,
        mlp=of_swiglu("mlp", num_dense * hidden * model.ffn_hidden_size),
        router=of_matrix("*.mlp.router.weight", num_routed * hidden * experts.num_experts),
        experts=of_swiglu("mlp.experts", num_routed * experts.num_active * hidden * experts.ffn_hidden_size),
        shared_experts=of_swiglu("mlp.shared_experts", num_routed * hidden * experts.shared_ffn_hidden_size),
        adaln=2 * modulation_products * num_segments * modulation if has_adaln else 0,
        timestep_mlp=2 * num_segments * timestep if has_adaln else 0,
        output_head=of_matrix(head, num_logits * hidden * model.vocab_size),
        adapters=2 * num_products * num_tokens * num_adapter_parameters(model, adapters),
    )


def _is_trained(name: str, model: ModelConfig, adapters: AdaptersConfig) -> bool:
    """Tell whether a parameter has a gradient, in any layer if its name begins with ``*.`` in the place of the layer's number."""
    if not name.startswith("*."):
        return is_trained(name, adapters)
    return any(is_trained(f"decoder.layers.{layer}.{name.removeprefix('*.')}", adapters) for layer in range(model.num_layers))


def num_parameters(model: ModelConfig, adapters: AdaptersConfig = NO_ADAPTERS) -> int:
    """Return the number of parameters of the whole model, adapters included. The linear maps of adaLN and of the timestep
    MLP have biases, and with qkv_bias the maps to queries, keys and values; all others have no bias. The numbers that balance experts are
    not parameters."""
    query_size, key_value_size = _attention_sizes(model)
    hidden, condition = model.hidden_size, model.condition_size
    attention = hidden * (query_size + 2 * key_value_size) + query_size * hidden
    attention += query_size + 2 * key_value_size if model.qkv_bias else 0
    norms = 2 * hidden + (2 * _kv_channels(model) if model.qk_norm else 0)
    embeddings = model.vocab_size * hidden * (1 if model.tie_embeddings else 2)
    total = embeddings + model.num_layers * (attention + norms) + _num_mlp_parameters(model) + hidden
    if model.conditioning == "adaln":
        timestep_mlp = (model.timestep_frequency_size + 1) * condition + (condition + 1) * condition
        total += (condition + 1) * hidden * (6 * model.num_layers + 2) + timestep_mlp
    return total + (model.vocab_size if model.learns_noise_rates else 0) + num_adapter_parameters(model, adapters)


def num_active_parameters(model: ModelConfig, adapters: AdaptersConfig = NO_ADAPTERS) -> int:
    """Return the number of parameters that compute a token: all, without the experts that the token is not routed to. Both tables of the
    vocabulary are counted, as in the published 1.4 billion of LLaDA2.0-mini."""
    experts = model.experts
    num_idle = max(0, experts.num_experts - experts.num_active)
    return num_parameters(model, adapters) - num_expert_layers(model) * num_idle * 3 * model.hidden_size * experts.ffn_hidden_size


def num_expert_layers(model: ModelConfig) -> int:
    """Return the number of layers that have experts instead of an MLP."""
    return max(0, model.num_layers - model.experts.num_dense_layers) if model.experts.num_experts else 0


def _num_mlp_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of all MLPs, routers and experts."""
    experts, num_routed = model.experts, num_expert_layers(model)
    of_experts = 3 * (experts.num_experts * experts.ffn_hidden_size + experts.shared_ffn_hidden_size) + experts.num_experts
    dense = (model.num_layers - num_routed) * 3 * model.ffn_hidden_size
    return model.hidden_size * (dense + num_routed * of_experts)


def _kv_channels(model: ModelConfig) -> int:
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def _attention_sizes(model: ModelConfig) -> tuple[int, int]:
    """Return the width of all queries together, and of all keys (or values) together."""
    num_query_groups = model.num_query_groups or model.num_attention_heads
    return model.num_attention_heads * _kv_channels(model), num_query_groups * _kv_channels(model)
