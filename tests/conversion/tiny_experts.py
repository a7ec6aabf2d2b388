"""Tiny random mixtures of experts: models of transformers, and directories with their weights under the names and keys of each family.

transformers has no class for Ling, LLaDA2 and LLaDA-MoE. Its Glm4Moe computes the function of Ling, and Qwen3Moe without normalised weights
the function of LLaDA-MoE.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.conversion.tiny_models import SIZES, transformers

NUM_EXPERTS, EXPERT_SIZE, NUM_ACTIVE = 16, 16, 4
_QWEN = {
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": NUM_ACTIVE,
    "moe_intermediate_size": EXPERT_SIZE,
    "norm_topk_prob": True,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
LING_CONFIG: dict[str, Any] = {
    **SIZES,
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 6,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": NUM_ACTIVE,
    "num_shared_experts": 1,
    "moe_intermediate_size": EXPERT_SIZE,
    "moe_shared_expert_intermediate_size": EXPERT_SIZE,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLADA_MOE_CONFIG: dict[str, Any] = {
    **{key: value for key, value in SIZES.items() if key != "intermediate_size"},
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rope_theta": 10000.0,
    "dense_intermediate_size": 48,
    "expert_intermediate_size": EXPERT_SIZE,
    "shared_expert_intermediate_size": None,
    "moe_layer_freq": [1, 1, 1, 1],
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": NUM_ACTIVE,
    "norm_topk_prob": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "routed_scaling_factor": 1,
    "router_num_group": None,
    "qk_layernorm": True,
    "tie_word_embeddings": False,
}


def make_qwen3_moe(directory: Path, **changes: Any) -> Any:
    """Save a Qwen3-MoE whose first layer is dense, in several shards, and return the model."""
    config = transformers.Qwen3MoeConfig(**{**SIZES, **_QWEN, "mlp_only_layers": [0], **changes})
    model = _random(transformers.Qwen3MoeForCausalLM, config)
    model.save_pretrained(directory, max_shard_size="50KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return model


def make_llada_moe(directory: Path) -> Any:
    """Save weights as LLaDA-MoE does, and return the model of transformers that has them."""
    model = make_qwen3_moe(directory, norm_topk_prob=False, mlp_only_layers=[])
    (directory / "config.json").write_text(json.dumps(LLADA_MOE_CONFIG))
    return model


def make_ling(directory: Path, *, merged: bool = False, num_predictors: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Save weights as Ling and LLaDA2 do, and return the model of transformers that has them.

    Args:
        merged: write the matrices of all experts of a layer as one tensor, as VeOmni does.
        num_predictors: layers behind the last layer, which predict further tokens.
        changes: values of config.json.
    """
    model = _random(transformers.Glm4MoeForCausalLM, _glm4_config())
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        for other, value in _ling_tensors(name, tensor, merged=merged):
            tensors[other] = value if other.endswith("expert_bias") else value.to(dtype)
    tensors |= _joined(tensors)
    last = SIZES["num_hidden_layers"]
    for number in range(last, last + num_predictors):
        own = {name.replace(".3.", f".{number}."): tensor for name, tensor in tensors.items() if name.startswith("model.layers.3.")}
        tensors |= own | {f"model.layers.{number}.{name}.weight": torch.ones(32) for name in ("eh_proj", "enorm", "hnorm")}
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**LING_CONFIG, **changes}))
    return model


def _glm4_config() -> Any:
    return transformers.Glm4MoeConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=12,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_ACTIVE,
        n_shared_experts=1,
        moe_intermediate_size=EXPERT_SIZE,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        use_qk_norm=True,
        num_mtp_layers=0,
    )


def _random(architecture: Callable[[Any], Any], config: Any) -> Any:
    """Make a model whose weights, biases and routers have ordinary values. Routers get large weights, so that no rounding changes a
    choice."""
    torch.manual_seed(7)
    model = architecture(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.6 if "gate.weight" in name else 0.15))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    return model.eval()


_LING = {
    "embed_tokens": "word_embeddings",
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "e_score_correction_bias": "expert_bias",
}


def _ling_tensors(name: str, tensor: torch.Tensor, *, merged: bool) -> list[tuple[str, torch.Tensor]]:
    for old, new in _LING.items():
        name = name.replace(old, new)
    if ".mlp.experts." not in name:
        return [(name, tensor)]
    prefix, _, kind = name.rpartition(".")
    parts = zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True) if kind == "gate_up_proj" else [("down_proj", tensor)]
    if merged:
        return [(f"{prefix}.{piece}", part) for piece, part in parts]
    return [(f"{prefix}.{expert}.{piece}.weight", matrix) for piece, part in parts for expert, matrix in enumerate(part)]


def _joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take the queries, keys and values out of ``tensors``, and return them as one tensor for each layer."""
    joined = {}
    for layer in range(SIZES["num_hidden_layers"]):
        pieces = [tensors.pop(f"model.layers.{layer}.self_attn.{piece}_proj.weight") for piece in "qkv"]
        joined[f"model.layers.{layer}.attention.query_key_value.weight"] = torch.cat(pieces)
    return joined


MAKERS: dict[str, Callable[..., Any]] = {"qwen3_moe": make_qwen3_moe, "llada2_moe": make_ling, "llada_moe": make_llada_moe}
"""Functions that save a model, by the names of export formats."""
