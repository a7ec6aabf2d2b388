"""The keys with which config.json files describe a mixture of experts: as a section ``model.experts``, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin

from w1train.config.field_types import field_types, scalar_type
from w1train.config.schema import ModelConfig
from w1train.config.schema_model import ExpertsConfig
from w1train.conversion.config_values import ConfigValues


@dataclass(frozen=True, slots=True)
class ExpertKeys:
    """The keys of a family of mixtures of experts, and the names of other keys that it spells in its own way."""

    read: Callable[[ConfigValues], dict[str, Any]]
    """A function that returns the fields of ExpertsConfig."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """A function that returns the keys of a model."""
    ffn_hidden_size: str = "intermediate_size"
    qk_norm: str = "qk_norm"
    qkv_bias: str = "qkv_bias"
    rotary_channels: Callable[[ConfigValues, int], int | None] = lambda _values, _channels: None
    """A function that returns the channels that are rotated, of those of a head; None = all of them."""
    has_rotary_factor: bool = False
    """The function reads partial_rotary_factor, which in other families must be 1."""


def compared_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that decide what experts compute and which channels are rotated. Equal functions have equal values."""
    channels = model.kv_channels or model.hidden_size // model.num_attention_heads
    whole: dict[str, Any] = {"rotary_channels": None if model.rotary_channels == channels else model.rotary_channels}
    experts = model.experts
    if not experts.num_experts:
        return whole | {"experts.num_experts": 0}
    values = asdict(experts)
    del values["router_precision"]
    if experts.score == "sigmoid":
        values["normalize"] = True
    elif experts.num_active == 1:
        # The only weight would be 1 whatever the score, and megatron-core then keeps the score.
        values["normalize"] = False
    if experts.num_groups == 1:
        values["num_active_groups"] = 1
    return whole | {f"experts.{name}": value for name, value in values.items()}


def _write_nothing(_model: ModelConfig) -> dict[str, Any]:
    return {}


def _read_nothing(_values: ConfigValues) -> dict[str, Any]:
    return {}


def _sizes(values: ConfigValues, ffn_hidden_size: str) -> dict[str, Any]:
    """Return the fields whose keys all families share."""
    key = values.given("num_experts", "num_local_experts")
    num_experts = values.integer(key, "experts.num_experts")
    if num_experts == 0 and values.has_valid(key):
        values.report(key, 0, "not a number >= 1")
    return {
        "num_experts": num_experts,
        "num_active": values.integer("num_experts_per_tok", "experts.num_active"),
        "ffn_hidden_size": values.integer(ffn_hidden_size, "experts.ffn_hidden_size"),
    }


def _require_agreement(values: ConfigValues, experts: dict[str, Any], keys: Mapping[str, str]) -> None:
    """Report keys that contradict each other, such as more experts of a token than there are experts.

    Args:
        experts: the fields that the keys give.
        keys: the key of each field that the family's files have.
    """
    layers = "num_hidden_layers"
    num_layers = values.integer(layers, "num_layers")
    num_experts, num_active, num_dense = experts["num_experts"], experts["num_active"], experts["num_dense_layers"]
    num_groups, num_active_groups = experts.get("num_groups", 1), experts.get("num_active_groups", 1)
    num_allowed = num_active_groups * num_experts // num_groups
    of_groups = f", of which {keys['num_active_groups']} allows {num_allowed}" if num_groups > 1 else ""
    contradictions = (
        ("num_dense_layers", num_dense >= num_layers, num_dense, f"below {layers} ({num_layers}), or no layer has experts"),
        ("num_groups", num_experts % num_groups, num_groups, f"a divisor of {keys['num_experts']} ({num_experts})"),
        ("num_active_groups", num_active_groups > num_groups, num_active_groups, f"at most the number of groups ({num_groups})"),
        ("num_active_groups", num_active % num_active_groups, num_active_groups, f"a divisor of {keys['num_active']} ({num_active})"),
        ("num_active", num_active > min(num_allowed, num_experts), num_active, f"at most {keys['num_experts']} ({num_experts}){of_groups}"),
    )
    if not values.has_valid(layers, *keys.values()):
        return
    for field, is_wrong, value, valid in contradictions:
        if is_wrong:
            found = values.raw(keys[field])
            values.report(keys[field], value if found is None else found, f"supported: {valid}")


def _keys(values: ConfigValues, num_dense_layers: str) -> dict[str, str]:
    """Return the keys of the fields that all families have."""
    num_experts = values.given("num_experts", "num_local_experts")
    return {"num_experts": num_experts, "num_active": "num_experts_per_tok", "num_dense_layers": num_dense_layers}


def _read_qwen3_moe(values: ConfigValues) -> dict[str, Any]:
    values.require("decoder_sparse_step", 1)
    sizes, normalize = _sizes(values, "moe_intermediate_size"), values.flag("norm_topk_prob", False)
    if normalize and sizes["num_active"] == 1 and values.has_valid("num_experts_per_tok"):
        values.report("norm_topk_prob", True, "supported: false with one expert for each token")
    num_dense = values.num_first_layers("mlp_only_layers")
    experts = {**sizes, "num_dense_layers": num_dense, "normalize": normalize, "router_precision": "model"}
    _require_agreement(values, experts, _keys(values, "mlp_only_layers"))
    return experts


def _write_qwen3_moe(model: ModelConfig) -> dict[str, Any]:
    experts = model.experts
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_active,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "norm_topk_prob": experts.normalize and experts.num_active > 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(experts.num_dense_layers)),
    }


def _read_ling(values: ConfigValues) -> dict[str, Any]:
    sizes = _sizes(values, "moe_intermediate_size")
    size, num_active = sizes["ffn_hidden_size"], sizes["num_active"]
    num_shared = values.integer("num_shared_experts", "experts.shared_ffn_hidden_size", 0)
    if values.has_valid("moe_intermediate_size", "num_shared_experts"):
        values.require("moe_shared_expert_intermediate_size", size, size * num_shared)
    values.require("norm_topk_prob", True)
    num_groups = values.integer("n_group", "experts.num_groups")
    num_active_groups = values.integer("topk_group", "experts.num_active_groups")
    keys = ("num_experts_per_tok", "n_group", "topk_group")
    if num_groups > 1 and values.has_valid(*keys) and num_active // num_active_groups != _BEST_OF_GROUP:
        # Ling adds up the two best scores of a group, and megatron-core the best num_active / num_active_groups.
        values.report("topk_group", num_active_groups, f"supported: half of num_experts_per_tok ({num_active})")
    experts = {
        **sizes,
        "shared_ffn_hidden_size": size * num_shared,
        "num_dense_layers": values.integer("first_k_dense_replace", "experts.num_dense_layers", 0),
        "score": values.choice("score_function", ("sigmoid",), "sigmoid"),
        "scale": values.number("routed_scaling_factor", "experts.scale", 1.0),
        "num_groups": num_groups,
        "num_active_groups": num_active_groups,
        "has_bias": values.flag("moe_router_enable_expert_bias", True),
        "router_precision": "fp32" if values.choice("router_dtype", ("fp32", "bf16"), "fp32") == "fp32" else "model",
    }
    groups = {"num_groups": "n_group", "num_active_groups": "topk_group"}
    _require_agreement(values, experts, _keys(values, "first_k_dense_replace") | groups)
    return experts


_BEST_OF_GROUP = 2
"""The scores of a group that Ling adds up to the group's score."""


def _write_ling(model: ModelConfig) -> dict[str, Any]:
    experts, channels = model.experts, model.kv_channels or model.hidden_size // model.num_attention_heads
    rotated = model.rotary_channels or channels
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_active,
        "moe_intermediate_size": experts.ffn_hidden_size,
        # Zero shared experts would be a module with empty matrices.
        "num_shared_experts": experts.shared_ffn_hidden_size // experts.ffn_hidden_size or None,
        "first_k_dense_replace": experts.num_dense_layers,
        "score_function": experts.score,
        "norm_topk_prob": True,
        "routed_scaling_factor": experts.scale,
        "n_group": experts.num_groups,
        "topk_group": experts.num_active_groups if experts.num_groups > 1 else 1,
        "moe_router_enable_expert_bias": experts.has_bias,
        "router_dtype": "fp32" if experts.router_precision == "fp32" else "bf16",
        "use_qk_norm": model.qk_norm,
        "use_qkv_bias": model.qkv_bias,
        "use_bias": False,
        "norm_head": False,
        "norm_softmax": False,
        "use_rmsnorm": True,
        "partial_rotary_factor": rotated / channels,
        "rotary_dim": rotated,
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "output_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
            "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
            "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
        },
    }


def _read_llada_moe(values: ConfigValues) -> dict[str, Any]:
    """Return the fields. LLaDA-MoE's code has a softmax and never normalises, whatever its keys say; with a bias it would put the bias into
    the weights, which this model does not do."""
    values.require("norm_topk_prob", False)
    values.require("moe_router_score_function", "softmax")
    values.require("moe_router_enable_expert_bias", False)
    values.require("routed_scaling_factor", 1)
    for key in ("router_num_group", "router_topk_group"):
        values.require(key, 1)
    values.require("shared_expert_intermediate_size", 0)
    experts = {
        **_sizes(values, "expert_intermediate_size"),
        "num_dense_layers": _num_dense_of_frequencies(values, "moe_layer_freq"),
        "normalize": False,
        "router_precision": "model",
    }
    _require_agreement(values, experts, _keys(values, "moe_layer_freq"))
    return experts


def _num_dense_of_frequencies(values: ConfigValues, key: str) -> int:
    """Return the number of zeros with which a list of zeros (dense layers) and ones (experts) begins; null or 1 = every layer has
    experts."""
    frequencies = values.raw(key)
    if frequencies is None or (type(frequencies) is int and frequencies == 1):
        return 0
    if not isinstance(frequencies, list) or any(type(value) is not int for value in frequencies):
        num_dense = -1
    else:
        num_dense = frequencies.count(0)
    if num_dense < 0 or frequencies != [0] * num_dense + [1] * (len(frequencies) - num_dense):
        values.report(key, frequencies, "supported: 1, or a list with 0 for the first layers (dense) and 1 for the others (experts)")
        return 0
    num_layers = values.integer("num_hidden_layers", "num_layers")
    if values.has_valid("num_hidden_layers") and len(frequencies) != num_layers:
        values.report(key, frequencies, f"supported: a number for each of the num_hidden_layers ({num_layers})")
        return 0
    return num_dense


def _write_llada_moe(model: ModelConfig) -> dict[str, Any]:
    experts = model.experts
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_active,
        "expert_intermediate_size": experts.ffn_hidden_size,
        "shared_expert_intermediate_size": None,
        "moe_layer_freq": [int(layer >= experts.num_dense_layers) for layer in range(model.num_layers)],
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1,
        "router_num_group": None,
        "router_topk_group": None,
        "qk_layernorm": model.qk_norm,
        "partial_rotary_factor": 1,
        "clip_qkv": None,
        "auto_map": {
            "AutoConfig": "configuration_lladamoe.LLaDAConfig",
            "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
        },
    }


def _read_own(values: ConfigValues) -> dict[str, Any]:
    """Return the fields of the object ``experts``, whose keys are the names of the fields."""
    if values.raw("experts") is not None and not isinstance(values.raw("experts"), dict):
        values.report("experts", values.raw("experts"), "not an object")
    experts = {field.name: _own_value(values, field.name, field.default) for field in fields(ExpertsConfig)}
    names = ("num_experts", "num_active", "num_dense_layers", "num_groups", "num_active_groups")
    if experts["num_experts"]:
        _require_agreement(values, experts, {name: f"experts.{name}" for name in names})
    return experts


def _own_value(values: ConfigValues, name: str, default: Any) -> Any:
    key, kind = f"experts.{name}", scalar_type(field_types(ExpertsConfig)[name])
    if get_origin(kind) is Literal:
        return values.choice(key, get_args(kind), default)
    if kind is bool:
        return values.flag(key, default)
    return values.integer(key, key, default) if kind is int else values.number(key, key, default)


def _write_own(model: ModelConfig) -> dict[str, Any]:
    return {
        "rotary_channels": model.rotary_channels,
        "experts": asdict(model.experts) if model.experts.num_experts else None,
    }


def _own_rotary_channels(values: ConfigValues, channels: int) -> int | None:
    return values.integer("rotary_channels", "rotary_channels") if values.raw("rotary_channels") is not None else None


DENSE = ExpertKeys(_read_nothing, _write_nothing)
QWEN3_MOE = ExpertKeys(_read_qwen3_moe, _write_qwen3_moe)
LING = ExpertKeys(
    _read_ling,
    _write_ling,
    qk_norm="use_qk_norm",
    qkv_bias="use_qkv_bias",
    rotary_channels=ConfigValues.rotary_channels,
    has_rotary_factor=True,
)
LLADA_MOE = ExpertKeys(_read_llada_moe, _write_llada_moe, ffn_hidden_size="dense_intermediate_size", qk_norm="qk_layernorm")
OWN = ExpertKeys(_read_own, _write_own, rotary_channels=_own_rotary_channels)
