"""Model families of Hugging Face transformers that this model can be: their config.json as a ModelConfig, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w1train.config.errors import UserError, listing
from w1train.config.schema import ModelConfig

CONFIG_FILE = "config.json"
W1 = "w1"
"""Model type of this project's own export, which w1train/conversion/remote_code implements."""


@dataclass(frozen=True, slots=True)
class Family:
    """A dense decoder with RMSNorm, rotary positions, SwiGLU and grouped queries; what tells it from the others."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    """Channels of a head where the file does not say; None = hidden_size / num_attention_heads."""


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
}
"""By config.json's model_type."""
W1_FAMILY = Family("W1ForMaskedDiffusion")

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

# What would make the files another function than this model: the key, whether its value is harmless, and what would be valid.
_HARMLESS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_act": (lambda value: value in (None, "silu", "swish"), "silu"),
    "attention_bias": (lambda value: not value, "false: here only queries, keys and values may have biases (Qwen2)"),
    "mlp_bias": (lambda value: not value, "false"),
    "use_sliding_window": (lambda value: not value, "false: attention sees whole documents"),
    "layer_types": (lambda value: set(value or ()) <= {"full_attention"}, "full_attention in every layer"),
    "partial_rotary_factor": (lambda value: value in (None, 1, 1.0), "1: all channels are rotated"),
    "quantization_config": (lambda value: value is None, "absent: weights in float32, bfloat16 or float16"),
}


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json.

    Raises:
        UserError: it is missing or no JSON object.
    """
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} has no JSON object at its top")
    return config


def model_from_config(config: Mapping[str, Any], origin: str) -> ModelConfig:
    """The model that a config.json describes.

    Args:
        origin: its name in messages.

    Raises:
        UserError: another architecture, or fields that this model has no switch for; all of them are named.
    """
    family = _family(config, origin)
    problems = [f"{key} is missing" for key in _REQUIRED if not isinstance(config.get(key), int)]
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    for key, (is_harmless, valid) in _HARMLESS.items():
        value = config.get(key, rope.get(key))
        if not is_harmless(value):
            problems.append(f"{key} is {value!r}; supported: {valid}")
    scaling = _rope_scaling(config, rope, problems)
    if problems:
        raise UserError(f"{origin} cannot be imported: " + "; ".join(problems))
    num_heads = config["num_attention_heads"]
    return ModelConfig(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=num_heads,
        num_query_groups=config.get("num_key_value_heads") or num_heads,
        kv_channels=config.get("head_dim") or family.head_dim or config["hidden_size"] // num_heads,
        ffn_hidden_size=config["intermediate_size"],
        max_sequence_length=config.get("max_position_embeddings", 2048),
        rope_base=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        **scaling,
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        qk_norm=config.get("qk_norm", family.qk_norm),
        qkv_bias=config.get("qkv_bias", family.qkv_bias),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        init_std=float(config.get("initializer_range", 0.02)),
        **_conditioning(config),
    )


def _family(config: Mapping[str, Any], origin: str) -> Family:
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    family = W1_FAMILY if model_type == W1 else FAMILIES.get(str(model_type))
    if family is None or (architectures and family.architecture not in architectures):
        known = [f"{name} ({each.architecture})" for name, each in {**FAMILIES, W1: W1_FAMILY}.items()]
        raise UserError(
            f"{origin} is a model of type {model_type!r} ({listing(architectures) or 'no architecture given'}), which cannot be imported; "
            f"supported: {listing(known)}"
        )
    return family


def _rope_scaling(config: Mapping[str, Any], rope: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The ModelConfig's rope fields. transformers 4 has rope_theta and rope_scaling, 5 has both in rope_parameters."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    where = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    if kind == "default":
        return {}
    if kind != "llama3":
        problems.append(f"{where}.rope_type is {kind!r}; supported: default, llama3")
        return {}
    names = {
        "rope_scaling_factor": "factor",
        "rope_low_frequency_factor": "low_freq_factor",
        "rope_high_frequency_factor": "high_freq_factor",
        "rope_original_length": "original_max_position_embeddings",
    }
    missing = [f"{where}.{key} is missing" for key in names.values() if not isinstance(rope.get(key), int | float)]
    problems += missing
    values = {} if missing else {field: float(rope[key]) for field, key in names.items()}
    if values:
        values["rope_original_length"] = int(values["rope_original_length"])
    return {"rope_scaling": "llama3", **values}


def _conditioning(config: Mapping[str, Any]) -> dict[str, Any]:
    """Only this project's own export has any; its modulations are in the files, so their initial values are unused."""
    if config.get("conditioning", "none") == "none":
        return {"conditioning": "none"}
    names = ("conditioning", "condition_size", "timestep_frequency_size", "timestep_scale")
    return {"adaln_init": "identity", **{name: config[name] for name in names}}


def stock_family(model: ModelConfig) -> str:
    """The family whose stock class is this model, run causally.

    Raises:
        UserError: there is none.
    """
    for name, family in FAMILIES.items():
        if not family_problems(model, name) and (model.qkv_bias, model.qk_norm) == (family.qkv_bias, family.qk_norm):
            return name
    problems = {problem for name in FAMILIES for problem in family_problems(model, name)}
    raise UserError(f"no stock class is this model ({listing(sorted(problems))}): export it with --format {W1}")


def family_problems(model: ModelConfig, name: str) -> list[str]:
    """Why a family's stock class is not this model; empty if it is."""
    family, problems = FAMILIES[name], []
    if model.conditioning != "none":
        problems.append(f"model.conditioning is {model.conditioning}, and stock classes have no timestep")
    for field in ("qkv_bias", "qk_norm"):
        if getattr(model, field) != getattr(family, field):
            problems.append(f"model.{field} is {str(getattr(model, field)).lower()}, not so in {name}")
    return problems


def config_of(model: ModelConfig, model_type: str, dtype: str, special: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model as ``model_type`` (a family, or "w1").

    Keys are those of transformers 4, which 5 reads too.

    Args:
        dtype: the weights' torch dtype by name.
        special: further keys, such as eos_token_id.
    """
    family = W1_FAMILY if model_type == W1 else FAMILIES[model_type]
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
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
