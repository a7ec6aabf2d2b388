"""Values of somebody else's config.json: each key that cannot be used has one message, and all of them come together."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile.commands import may_refuse
from w1train.config.errors import UserError
from w1train.config.field_types import field_ranges
from w1train.config.schema import ModelConfig
from w1train.config.schema_model import ExpertsConfig
from w1train.conversion.families import FAMILIES, model_from_config

MISSING = object()
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "layer_types": ["full_attention"] * 2,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "qk_norm": False,
    "qkv_bias": False,
}
OF_VERSION_4 = {"rope_theta": 10000.0, "rope_scaling": {"type": "llama3", **ROPE}}
OF_VERSION_5 = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **ROPE}}
OF_OUR_OWN = {"conditioning": "adaln", "condition_size": 16, "timestep_frequency_size": 16, "timestep_scale": 1000.0}
OF_EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    },
    "llada2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "num_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "partial_rotary_factor": 0.5,
        "rotary_dim": 4,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_bias": False,
        "norm_head": False,
        "use_rmsnorm": True,
    },
    "llada_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "expert_intermediate_size": 16,
        "dense_intermediate_size": 48,
        "shared_expert_intermediate_size": None,
        "moe_layer_freq": [0, 1],
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "router_num_group": None,
        "qk_layernorm": True,
        "clip_qkv": None,
    },
}
OF_OWN_EXPERTS = {"rotary_channels": 4, "experts": {**asdict(ExpertsConfig(num_experts=8, num_active=2, score="sigmoid", has_bias=True))}}
DENSE = [name for name, family in FAMILIES.items() if family.experts is None]
CONFIGS: dict[str, dict[str, Any]] = {
    **{
        name: {**COMMON, **OF_VERSION_4, **OF_EXPERTS.get(name, {}), "model_type": name, "architectures": [each.architecture]}
        for name, each in FAMILIES.items()
    },
    "w1": {**COMMON, **OF_VERSION_5, **OF_OUR_OWN, **OF_OWN_EXPERTS, "model_type": "w1"},
}
VALUES = [MISSING, None, "7", "", "text", -1, -7, 0, 10**30, 1.5, -0.5, 1e300, math.nan, math.inf, True, False, [], [1], {}, {"a": 1}]
# With other values of these keys, some of the other keys are not read. The last three are compared with other keys.
_DECIDING = (
    *("rope_scaling", "rope_parameters", "type", "rope_type", "conditioning", "experts"),
    *("moe_shared_expert_intermediate_size", "rotary_dim", "moe_layer_freq"),
)

type Path = tuple[str, ...]


def paths(config: dict[str, Any]) -> list[Path]:
    """The keys of a configuration, those of nested objects too, without the names of the architecture."""
    found: list[Path] = [(key,) for key in config if key not in ("model_type", "architectures")]
    return found + [(key, inner) for key, value in config.items() if isinstance(value, dict) for inner in value]


def changed(config: dict[str, Any], changes: dict[Path, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for (*parents, key), value in changes.items():
        place = config[parents[0]] if parents else config
        if value is MISSING:
            del place[key]
        else:
            place[key] = value
    return config


def complaint(config: dict[str, Any]) -> str | None:
    """The problems as text; None if the configuration is a model whose values are all in their ranges."""
    try:
        model = model_from_config(config, "origin")
    except UserError as error:
        beginning, _, problems = str(error).partition("origin cannot be imported: ")
        return problems if beginning == "" else f"not the error of its keys: {error}"
    for field, valid in field_ranges(ModelConfig).items():
        value = getattr(model, field)
        assert value is None or value in valid, field
    for field, valid in field_ranges(ExpertsConfig).items():
        assert getattr(model.experts, field) in valid, field
    for field in ("vocab_size", "hidden_size", "num_query_groups", "kv_channels", "max_sequence_length", "rope_original_length"):
        assert type(getattr(model, field)) is int, field
    return None


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configurations_themselves_are_models(name):
    assert complaint(CONFIGS[name]) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_each_value_of_each_key_alone(name):
    """It has one message, which begins with the key."""
    for path in paths(CONFIGS[name]):
        for value in VALUES:
            text = complaint(changed(CONFIGS[name], {path: value}))
            if text is not None and path[-1] not in _DECIDING:
                assert re.match(rf"{re.escape('.'.join(path))} is ", text), (path, value, text)
                named = [other for other in paths(CONFIGS[name]) if re.search(rf"(?:^|; ){re.escape('.'.join(other))} is ", text)]
                assert named == [path], text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", None, "hidden_size is missing"),
        ("hidden_size", 4096.0, "hidden_size is 4096.0, not an integer"),
        ("hidden_size", "4096", "hidden_size is '4096', not an integer"),
        ("hidden_size", -4096, "hidden_size is -4096, not a number >= 1 and <= 1048576"),
        ("num_hidden_layers", 10**30, f"num_hidden_layers is {10**30}, not a number >= 1 and <= 4096"),
        ("rms_norm_eps", "1e-6", "rms_norm_eps is '1e-6', not a number"),
        ("rms_norm_eps", 0, "rms_norm_eps is 0, not a number > 0"),
        ("rope_scaling", [], "rope_scaling is [], not an object"),
        ("rope_scaling", {"rope_theta": "1e6"}, "rope_scaling.rope_theta is '1e6', not a number"),
        ("rope_scaling", {"full_attention": {"rope_theta": 1e6}}, "rope_scaling.full_attention is {'rope_theta': 1000000.0}, not a single"),
        ("rope_scaling", {"partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor is 0.5; supported: 1"),
        ("attention_bias", "false", "attention_bias is 'false'; supported: false"),
        ("layer_types", "", "layer_types is ''; supported: full_attention in every layer"),
    ],
)
def test_messages(key, value, message):
    for name in DENSE:
        assert (complaint({**CONFIGS[name], key: value}) or "").startswith(message)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {"num_local_experts": 4}, "num_local_experts is 4, but num_experts is 8 (give one of them)"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts is 0, not a number >= 1"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers is [1]; supported: the first layers, such as [0, 1]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; supported: 1"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "norm_topk_prob is True; supported: false with one expert for each token"),
        ("llada2_moe", {"num_experts_per_tok": 6}, "topk_group is 2; supported: half of num_experts_per_tok (6)"),
        ("llada2_moe", {"rotary_dim": 8}, "partial_rotary_factor is 0.5, but of 8 channels it rotates 4, and rotary_dim is 8"),
        ("llada2_moe", {"rotary_dim": None, "partial_rotary_factor": None}, "partial_rotary_factor is missing"),
        ("llada2_moe", {"partial_rotary_factor": 2}, "partial_rotary_factor is 2, not a number > 0 and <= 1"),
        ("llada2_moe", {"score_function": "softmax"}, "score_function is 'softmax'; supported: sigmoid"),
        ("llada2_moe", {"norm_topk_prob": False}, "norm_topk_prob is False; supported: true"),
        ("llada2_moe", {"moe_shared_expert_intermediate_size": 8}, "moe_shared_expert_intermediate_size is 8; supported: 16, 32"),
        ("llada_moe", {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias is True; supported: false"),
        ("llada_moe", {"norm_topk_prob": True}, "norm_topk_prob is True; supported: false"),
        ("llada_moe", {"moe_layer_freq": [1, 0]}, "moe_layer_freq is [1, 0]; supported: 1, or a list with 0 for the first layers"),
        ("llada_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size is 8; supported: 0"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; supported: at most num_experts (8)"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "mlp_only_layers is [0, 1]; supported: below num_hidden_layers (2), or"),
        ("llada2_moe", {"first_k_dense_replace": 2}, "first_k_dense_replace is 2; supported: below num_hidden_layers (2)"),
        ("llada2_moe", {"num_experts": 6}, "n_group is 4; supported: a divisor of num_experts (6)"),
        (
            "llada2_moe",
            {"n_group": 8, "num_experts": 16, "num_experts_per_tok": 20, "topk_group": 10},
            "topk_group is 10; supported: at most",
        ),
        ("llada2_moe", {"num_experts": 4}, "num_experts_per_tok is 4; supported: at most num_experts (4), of which topk_group allows 2"),
        ("llada2_moe", {"num_experts_per_tok": 5}, "topk_group is 2; supported: a divisor of num_experts_per_tok (5)"),
        (
            "llada_moe",
            {"moe_layer_freq": [0, 1, 1]},
            "moe_layer_freq is [0, 1, 1]; supported: a number for each of the num_hidden_layers (2)",
        ),
        ("llada_moe", {"moe_layer_freq": [0, 0]}, "moe_layer_freq is [0, 0]; supported: below num_hidden_layers (2)"),
        ("w1", {"experts": {"num_experts": 2, "num_active": 4}}, "experts.num_active is 4; supported: at most experts.num_experts (2)"),
        ("w1", {"experts": [1]}, "experts is [1], not an object"),
        ("w1", {"experts": {"score": "tanh"}}, "experts.score is 'tanh'; supported: softmax, sigmoid"),
    ],
    ids=str,
)
def test_messages_of_experts(family, changes, message):
    assert (complaint({**CONFIGS[family], **changes}) or "").startswith(message)


def test_experts_of_each_family():
    qwen, ling, llada = (model_from_config(CONFIGS[name], "origin") for name in OF_EXPERTS)
    sizes = {"num_experts": 8, "num_active": 4, "ffn_hidden_size": 16, "num_dense_layers": 1}
    assert qwen.experts == ExpertsConfig(**sizes, normalize=True, router_precision="model")
    assert llada.experts == ExpertsConfig(**sizes, normalize=False, router_precision="model")
    groups = {"num_groups": 4, "num_active_groups": 2}
    assert ling.experts == ExpertsConfig(**sizes, **groups, shared_ffn_hidden_size=32, score="sigmoid", scale=2.5, has_bias=True)
    assert (ling.rotary_channels, qwen.rotary_channels, llada.ffn_hidden_size) == (4, None, 48)


LONGER = {"rope_type": "llama3", **ROPE}


@pytest.mark.parametrize("name", DENSE)
def test_two_rotary_embeddings(name):
    """transformers takes rope_scaling and ignores rope_parameters, so two that differ have no meaning."""
    given = {**COMMON, "model_type": name}
    differ = complaint({**given, "rope_scaling": {**LONGER, "factor": "8"}, "rope_parameters": LONGER}) or ""
    assert re.fullmatch(r"rope_scaling is \{.*\}, but rope_parameters is \{.*\} \(give one of them\)", differ)
    assert "; " not in differ
    for scaling, parameters in ((LONGER, LONGER), (LONGER, {}), ({}, LONGER), (None, LONGER)):
        model = model_from_config({**given, "rope_scaling": scaling, "rope_parameters": parameters}, "origin")
        assert model.rope_scaling_factor == 8.0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3", {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 500000.0, but rope_parameters.rope_theta is"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "type": "default", **ROPE}},
            "rope_scaling.type is 'default', but rope_scaling.r",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "default", "type": "yarn"}},
            "rope_scaling.type is 'yarn', but rope_scaling.rope_type is 'd",
        ),
        (
            "llada2_moe",
            {"rope_scaling": {"partial_rotary_factor": 0.25}},
            "partial_rotary_factor is 0.5, but rope_scaling.partial_rotary_f",
        ),
    ],
    ids=str,
)
def test_the_same_key_at_two_places(name, changes, message):
    """Programs differ in which of two values they take, so two that differ have no meaning."""
    config = {**COMMON, **OF_EXPERTS.get(name, {}), "model_type": name}
    assert (complaint({**config, **changes}) or "").startswith(message)
    equal = {"rope_theta": 1e6, "rope_scaling": {"rope_theta": 1e6, "rope_type": "default", "type": "default"}}
    assert model_from_config({**config, **equal}, "origin").rope_base == 1e6


def test_more_heads_than_channels():
    config = {**CONFIGS["llama"], "num_attention_heads": 64, "head_dim": None}
    assert complaint(config) == "num_attention_heads is 64; supported: at most hidden_size (32)"


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_all_problems_come_together(data):
    """Several keys of any family at once: exactly the messages that each has alone."""
    config = CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))]
    free = [path for path in paths(config) if path[-1] not in _DECIDING]
    chosen = data.draw(st.lists(st.sampled_from(free), unique=True, max_size=8))
    changes = {path: data.draw(st.sampled_from(VALUES)) for path in chosen}
    alone = [text for path, value in changes.items() if (text := complaint(changed(config, {path: value}))) is not None]
    together = complaint(changed(config, changes)) or ""
    assert "; ".join(sorted(alone, key=together.find)) == together


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_values_of_any_keys_are_a_model_or_one_error(data):
    """With the deciding keys and the names of the architecture too."""
    config = CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))]
    keys = data.draw(st.lists(st.sampled_from(sorted(config)), unique=True, max_size=8))
    changes = {(key,): data.draw(st.sampled_from(VALUES)) for key in keys}
    with may_refuse(UserError, "origin "):
        model_from_config(changed(config, changes), "origin")
