"""Model families of Hugging Face transformers that this model can represent: their config.json as a ModelConfig, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from w1train.config.errors import UserError, listing
from w1train.config.reading import read_json_object, shorten
from w1train.config.schema import ModelConfig
from w1train.config.schema_model import ExpertsConfig
from w1train.conversion.config_values import ConfigValues
from w1train.conversion.expert_keys import DENSE, LING, LLADA_MOE, OWN, QWEN3_MOE, ExpertKeys, compared_fields
from w1train.conversion.tensors import LING_NAMES, LLAMA_NAMES, TensorNames

CONFIG_FILE = "config.json"
W1 = "w1"
"""Model type of this project's own export, whose code is in w1train/conversion/remote_code."""
STOCK = "stock"
"""Format of an export for the first family that fits."""


@dataclass(frozen=True, slots=True)
class Family:
    """The differences of a model family from others. All are decoders with RMSNorm, rotary positions, SwiGLU and grouped queries."""

    architecture: str
    """The class that an export names."""
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    """Channels of a head if the file does not give them; None = hidden_size / num_attention_heads."""
    experts: ExpertKeys | None = None
    """The keys of a mixture of experts; None = the family is dense."""
    names: TensorNames = LLAMA_NAMES
    is_causal: bool = True
    """True: the class attends causally, and its outputs are the next token's. False: the class is a diffusion model, whose outputs are its
    own token's."""
    model_type: str | None = None
    """The model type that an export names; None = the name of the family."""
    others: tuple[tuple[str, str], ...] = ()
    """Further model types and architectures with the same keys and tensors."""


FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        experts=QWEN3_MOE,
        others=(("rnd1", "RND1LM"), ("sdar_moe", "SDARMoeForCausalLM")),
    ),
    "llada2_moe": Family(
        "LLaDA2MoeModelLM",
        qk_norm=True,
        experts=LING,
        names=LING_NAMES,
        is_causal=False,
        others=(
            ("llada2_moe_veomni", "LLaDA2MoeModelLM"),
            ("bailing_moe", "BailingMoeV2ForCausalLM"),
            ("bailing_moe_v2", "BailingMoeV2ForCausalLM"),
        ),
    ),
    "llada_moe": Family(
        "LLaDAMoEModelLM",
        qk_norm=True,
        experts=LLADA_MOE,
        is_causal=False,
        model_type="llada",
        others=(("llada", "LLaDAMoEModel"), ("llada_moe", "LLaDAMoEModelLM"), ("llada_moe", "LLaDAMoEModel")),
    ),
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
}
"""Families by the names of export formats."""
W1_FAMILY = Family("W1ForMaskedDiffusion", experts=OWN, is_causal=False)


def read_config(directory: Path) -> dict[str, Any]:
    """Read a directory's config.json.

    Raises:
        UserError: the file is missing or not a JSON object.
    """
    path = directory / CONFIG_FILE
    try:
        return read_json_object(path, "configuration of a model")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def model_from_config(config: Mapping[str, Any], origin: str) -> ModelConfig:
    """Return the model that a config.json describes.

    Args:
        origin: the name of the file or directory, for messages.

    Raises:
        UserError: the architecture is unknown, or keys have values that this model cannot represent. Each of these keys is named once.
    """
    family = family_of(config, origin)
    is_own, keys = family is W1_FAMILY, family.experts or DENSE
    values = ConfigValues(config)
    values.require_harmless(may_rotate_part=keys.has_rotary_factor)
    num_heads, hidden_size = values.integer("num_attention_heads", "num_attention_heads"), values.integer("hidden_size", "hidden_size")
    head_dim = values.head_dim(family.head_dim, hidden_size, num_heads)
    fields = {
        "vocab_size": values.integer("vocab_size", "vocab_size"),
        "num_layers": values.integer("num_hidden_layers", "num_layers"),
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_query_groups": values.integer("num_key_value_heads", "num_query_groups", num_heads),
        "kv_channels": head_dim,
        "ffn_hidden_size": values.integer(keys.ffn_hidden_size, "ffn_hidden_size"),
        "max_sequence_length": values.integer("max_position_embeddings", "max_sequence_length", 2048),
        "rotary_channels": keys.rotary_channels(values, head_dim),
        "rope_base": values.rope_base(),
        **values.rope_scaling(),
        "norm_epsilon": values.number("rms_norm_eps", "norm_epsilon", 1e-6),
        "qk_norm": values.flag(keys.qk_norm, family.qk_norm),
        "qkv_bias": values.flag(keys.qkv_bias, family.qkv_bias),
        "tie_embeddings": values.flag("tie_word_embeddings", False),
        "init_std": values.number("initializer_range", "init_std", 0.02),
        **(values.conditioning() if is_own else {"conditioning": "none"}),
        "experts": ExpertsConfig(**keys.read(values)),
    }
    if values.problems:
        raise UserError(f"{origin} cannot be imported: " + "; ".join(values.problems.values()))
    return ModelConfig(**fields)


def family_of(config: Mapping[str, Any], origin: str) -> Family:
    """Return the family of a config.json, by its model type and its architecture.

    Raises:
        UserError: it is no family that this model can represent.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    known = [
        (kind, architecture, family)
        for name, family in {**FAMILIES, W1: W1_FAMILY}.items()
        for kind, architecture in ((family.model_type or name, family.architecture), *family.others)
    ]
    for kind, architecture, family in known:
        if model_type == kind and (not architectures or architecture in architectures):
            return family
    raise UserError(
        f"{origin} is a model of type {shorten(model_type)} ({_named(architectures)}), which cannot be imported; "
        f"supported: {listing(f'{kind} ({architecture})' for kind, architecture, _ in known)}"
    )


def _named(architectures: list[Any]) -> str:
    names = listing(name if isinstance(name, str) and len(name) < 80 else shorten(name) for name in architectures[:3])
    return names or "no architecture given"


def stock_family(model: ModelConfig) -> str:
    """Return the family whose class computes this model.

    Raises:
        UserError: no family's class computes this model.
    """
    candidates = [name for name, family in FAMILIES.items() if (family.experts is None) == (model.experts.num_experts == 0)]
    problems = {name: family_problems(model, name) for name in candidates}
    for name in candidates:
        if not problems[name]:
            return name
    every = {problem for each in problems.values() for problem in each}
    raise UserError(f"no stock class computes this model ({listing(sorted(every))}): export it with --format {W1}")


def family_problems(model: ModelConfig, name: str) -> list[str]:
    """Return the reasons why a family's class cannot compute this model; empty if it can."""
    family, problems = FAMILIES[name], []
    if model.conditioning != "none":
        problems.append(f"model.conditioning is {model.conditioning}, and stock classes have no timestep")
    problems += [
        f"model.{field} is {json.dumps(getattr(model, field))}, and {json.dumps(getattr(family, field))} in {name}"
        for field in ("qkv_bias", "qk_norm")
        if getattr(model, field) != getattr(family, field)
    ]
    if (family.experts is None) != (model.experts.num_experts == 0):
        has = "no experts" if family.experts is None else "experts"
        return [*problems, f"model.experts.num_experts is {model.experts.num_experts}, and {name} has {has}"]
    return problems + _lost_in(model, name)


def _lost_in(model: ModelConfig, name: str) -> list[str]:
    """Return what a family's config.json would not say of a model: it is written and read again."""
    try:
        found = model_from_config(config_of(replace(model, conditioning="none"), name, "float32", {}), name)
    except UserError as error:
        return [str(error)]
    before, after = compared_fields(model), compared_fields(found)
    return [
        f"model.{field} is {json.dumps(value)}, and {json.dumps(after[field])} in {name}"
        for field, value in before.items()
        if value != after[field]
    ]


def config_of(model: ModelConfig, model_type: str, dtype: str, special: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a model as ``model_type`` (a name in FAMILIES, or "w1").

    The keys are those of transformers 4, which transformers 5 reads too.

    Args:
        dtype: the name of the weights' torch dtype.
        special: further keys, such as eos_token_id.
    """
    family = W1_FAMILY if model_type == W1 else FAMILIES[model_type]
    keys = family.experts or DENSE
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type or model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        keys.ffn_hidden_size: model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.kv_channels or model.hidden_size // model.num_attention_heads,
        "max_position_embeddings": model.max_sequence_length,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        "rope_scaling": _rope_dictionary(model),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "torch_dtype": dtype,
        **keys.write(model),
        **special,
    }
    if model_type == W1:
        config["auto_map"] = {
            "AutoConfig": "configuration_w1.W1Config",
            "AutoModel": f"modeling_w1.{family.architecture}",
            "AutoModelForMaskedLM": f"modeling_w1.{family.architecture}",
        }
        names = ("qk_norm", "qkv_bias", "conditioning", "condition_size", "timestep_frequency_size", "timestep_scale")
        config |= {name: getattr(model, name) for name in names}
    return config


def _rope_dictionary(model: ModelConfig) -> dict[str, Any] | None:
    if model.rope_scaling == "none":
        return None
    return {
        "rope_type": model.rope_scaling,
        "factor": model.rope_scaling_factor,
        "low_freq_factor": model.rope_low_frequency_factor,
        "high_freq_factor": model.rope_high_frequency_factor,
        "original_max_position_embeddings": model.rope_original_length,
    }
