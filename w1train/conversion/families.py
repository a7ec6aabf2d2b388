"""Model families of Hugging Face transformers that this model can represent: their config.json as a ModelConfig, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w1train.config.errors import UserError, listing
from w1train.config.field_types import field_ranges
from w1train.config.reading import read_json_object, shorten
from w1train.config.schema import ModelConfig

CONFIG_FILE = "config.json"
W1 = "w1"
"""Model type of this project's own export, whose code is in w1train/conversion/remote_code."""
STOCK = "stock"
"""Format of an export for the first family that fits."""


@dataclass(frozen=True, slots=True)
class Family:
    """The differences of a model family from others. All are dense decoders with RMSNorm, rotary positions, SwiGLU and grouped queries."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    """Channels of a head if the file does not give them; None = hidden_size / num_attention_heads."""


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
}
"""Families by the model_type in config.json."""
W1_FAMILY = Family("W1ForMaskedDiffusion")


def _is_full_attention(layer_types: Any) -> bool:
    return not layer_types or (isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types))


# Keys that can make the files compute another function than this model. Each key has a test of whether a value is harmless, and the valid
# values in words.
_HARMLESS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_act": (lambda value: value in (None, "silu", "swish"), "silu"),
    "attention_bias": (lambda value: not value, "false: here only queries, keys and values may have biases (Qwen2)"),
    "mlp_bias": (lambda value: not value, "false"),
    "use_sliding_window": (lambda value: not value, "false: attention sees whole documents"),
    "layer_types": (_is_full_attention, "full_attention in every layer"),
    "partial_rotary_factor": (lambda value: value in (None, 1, 1.0), "1: all channels are rotated"),
    "quantization_config": (lambda value: value is None, "absent: weights in float32, bfloat16 or float16"),
}


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
        UserError: the architecture is unknown, or fields have values that this model cannot represent; all of them are named.
    """
    family = _family(config, origin)
    values = _Values(config)
    for key, (is_harmless, valid) in _HARMLESS.items():
        if not is_harmless(value := config.get(key, values.rope.get(key))):
            values.problems.append(f"{key} is {shorten(value)}; supported: {valid}")
    num_heads, hidden_size = values.integer("num_attention_heads"), values.integer("hidden_size")
    of_own_export = config.get("model_type") == W1
    fields = {
        "vocab_size": values.integer("vocab_size"),
        "num_layers": values.integer("num_hidden_layers"),
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_query_groups": values.integer("num_key_value_heads", num_heads),
        "kv_channels": values.integer("head_dim", family.head_dim or hidden_size // max(num_heads, 1)),
        "ffn_hidden_size": values.integer("intermediate_size"),
        "max_sequence_length": values.integer("max_position_embeddings", 2048),
        "rope_base": values.number("rope_theta", 10000.0),
        **values.rope_scaling(),
        "norm_epsilon": values.number("rms_norm_eps", 1e-6),
        "qk_norm": values.flag("qk_norm", family.qk_norm),
        "qkv_bias": values.flag("qkv_bias", family.qkv_bias),
        "tie_embeddings": values.flag("tie_word_embeddings", False),
        "init_std": values.number("initializer_range", 0.02),
        **(values.conditioning() if of_own_export else {"conditioning": "none"}),
    }
    # Values that have been reported are zeros here, which must not be reported again.
    if not values.problems:
        values.problems += [
            f"model.{name} would be {shorten(fields[name])}, not {valid.words(fields[name])}"
            for name, valid in field_ranges(ModelConfig).items()
            if name in fields and fields[name] not in valid
        ]
    if values.problems:
        raise UserError(f"{origin} cannot be imported: " + "; ".join(values.problems))
    return ModelConfig(**fields)


def _family(config: Mapping[str, Any], origin: str) -> Family:
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    family = W1_FAMILY if model_type == W1 else FAMILIES.get(str(model_type))
    if family is None or (architectures and family.architecture not in architectures):
        known = [f"{name} ({each.architecture})" for name, each in {**FAMILIES, W1: W1_FAMILY}.items()]
        raise UserError(
            f"{origin} is a model of type {shorten(model_type)} ({_named(architectures)}), which cannot be imported; "
            f"supported: {listing(known)}"
        )
    return family


def _named(architectures: list[Any]) -> str:
    names = listing(name if isinstance(name, str) and len(name) < 80 else shorten(name) for name in architectures[:3])
    return names or "no architecture given"


class _Values:
    """The values of a config.json by their types. Values that are missing or of another type become problems."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.problems: list[str] = []
        self._config = config
        # transformers 4 has rope_theta and rope_scaling; version 5 has both in rope_parameters.
        self._rope_key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        self.rope: dict[str, Any] = {}
        for key in ("rope_scaling", "rope_parameters"):
            value = config.get(key) or {}
            if isinstance(value, dict):
                self.rope |= value
            else:
                self.problems.append(f"{key} is {shorten(value)}, not an object")

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer, or the default if the file has null or lacks the key."""
        value = self._config.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            self.problems.append(f"{key} is missing")
        elif type(value) is not int:
            self.problems.append(f"{key} is {shorten(value)}, not an integer")
        return value if type(value) is int else 0

    def number(self, key: str, default: float) -> float:
        """Return a number from rope_parameters or from the top, or the default if the file has null or lacks the key."""
        found = (value for value in (self.rope.get(key), self._config.get(key)) if value is not None)
        return self._as_number(key, next(found, default))

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false, or the default if the file has null or lacks the key."""
        value = self._config.get(key)
        if value is not None and not isinstance(value, bool):
            self.problems.append(f"{key} is {shorten(value)}, not true or false")
        return value if isinstance(value, bool) else default

    def rope_scaling(self) -> dict[str, Any]:
        """Return the fields of ModelConfig for rope scaling."""
        kind = self.rope.get("rope_type", self.rope.get("type", "default"))
        if kind == "default":
            return {}
        if kind != "llama3":
            self.problems.append(f"{self._rope_key}.rope_type is {shorten(kind)}; supported: default, llama3")
            return {}
        names = {
            "rope_scaling_factor": "factor",
            "rope_low_frequency_factor": "low_freq_factor",
            "rope_high_frequency_factor": "high_freq_factor",
            "rope_original_length": "original_max_position_embeddings",
        }
        missing = [f"{self._rope_key}.{key} is missing" for key in names.values() if self.rope.get(key) is None]
        self.problems += missing
        values = {} if missing else {field: self._as_number(f"{self._rope_key}.{key}", self.rope[key]) for field, key in names.items()}
        if values:
            values["rope_original_length"] = int(values["rope_original_length"])
        return {"rope_scaling": "llama3", **values}

    def conditioning(self) -> dict[str, Any]:
        """Return the fields of ModelConfig for conditioning.

        Only this project's own export has a timestep input. Its files hold the modulations, so their initial values are not used.
        """
        kind = self._config.get("conditioning", "none")
        if kind not in ("none", "adaln"):
            self.problems.append(f"conditioning is {shorten(kind)}; supported: none, adaln")
        if kind != "adaln":
            return {"conditioning": "none"}
        sizes = {key: self.integer(key) for key in ("condition_size", "timestep_frequency_size")}
        scale = self.number("timestep_scale", 1000.0)
        return {"adaln_init": "identity", "conditioning": kind, **sizes, "timestep_scale": scale}

    def _as_number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.problems.append(f"{key} is {shorten(value)}, not a number")
            return 0.0
        return float(value)


def stock_family(model: ModelConfig) -> str:
    """Return the family whose stock class computes this model causally.

    Raises:
        UserError: no stock class computes this model.
    """
    for name, family in FAMILIES.items():
        if not family_problems(model, name) and (model.qkv_bias, model.qk_norm) == (family.qkv_bias, family.qk_norm):
            return name
    problems = {problem for name in FAMILIES for problem in family_problems(model, name)}
    raise UserError(f"no stock class computes this model ({listing(sorted(problems))}): export it with --format {W1}")


def family_problems(model: ModelConfig, name: str) -> list[str]:
    """Return the reasons why a family's stock class cannot compute this model; empty if it can."""
    family, problems = FAMILIES[name], []
    if model.conditioning != "none":
        problems.append(f"model.conditioning is {model.conditioning}, and stock classes have no timestep")
    for field in ("qkv_bias", "qk_norm"):
        if getattr(model, field) != getattr(family, field):
            problems.append(f"model.{field} is {str(getattr(model, field)).lower()}, and {str(getattr(family, field)).lower()} in {name}")
    return problems


def config_of(model: ModelConfig, model_type: str, dtype: str, special: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a model as ``model_type`` (a family, or "w1").

    The keys are those of transformers 4, which transformers 5 reads too.

    Args:
        dtype: the name of the weights' torch dtype.
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
