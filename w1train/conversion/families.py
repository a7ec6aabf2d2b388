"""Model families of Hugging Face transformers that this model can represent: their config.json as a ModelConfig, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w1train.config.errors import UserError, listing
from w1train.config.field_types import field_ranges
from w1train.config.reading import is_number, read_json_object, shorten
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
    return isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)


# Keys that can make the files compute another function than this model. Each key has a test of whether a value is harmless (null always
# is), and the valid values in words.
_HARMLESS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_act": (lambda value: value in ("silu", "swish"), "silu"),
    "attention_bias": (lambda value: value is False, "false: here only queries, keys and values may have biases (Qwen2)"),
    "mlp_bias": (lambda value: value is False, "false"),
    "use_sliding_window": (lambda value: value is False, "false: attention sees whole documents"),
    "layer_types": (_is_full_attention, "full_attention in every layer"),
    "partial_rotary_factor": (lambda value: is_number(value) and value == 1, "1: all channels are rotated"),
    "quantization_config": (lambda value: False, "absent: weights in float32, bfloat16 or float16"),
}
_RANGES = field_ranges(ModelConfig)


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
    family = _family(config, origin)
    values = _Values(config)
    values.require_harmless()
    num_heads, hidden_size = values.integer("num_attention_heads", "num_attention_heads"), values.integer("hidden_size", "hidden_size")
    of_own_export = config.get("model_type") == W1
    fields = {
        "vocab_size": values.integer("vocab_size", "vocab_size"),
        "num_layers": values.integer("num_hidden_layers", "num_layers"),
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_query_groups": values.integer("num_key_value_heads", "num_query_groups", num_heads),
        "kv_channels": values.head_dim(family.head_dim, hidden_size, num_heads),
        "ffn_hidden_size": values.integer("intermediate_size", "ffn_hidden_size"),
        "max_sequence_length": values.integer("max_position_embeddings", "max_sequence_length", 2048),
        "rope_base": values.rope_base(),
        **values.rope_scaling(),
        "norm_epsilon": values.number("rms_norm_eps", "norm_epsilon", 1e-6),
        "qk_norm": values.flag("qk_norm", family.qk_norm),
        "qkv_bias": values.flag("qkv_bias", family.qkv_bias),
        "tie_embeddings": values.flag("tie_word_embeddings", False),
        "init_std": values.number("initializer_range", "init_std", 0.02),
        **(values.conditioning() if of_own_export else {"conditioning": "none"}),
    }
    if values.problems:
        raise UserError(f"{origin} cannot be imported: " + "; ".join(values.problems.values()))
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
    """The values of a config.json by their types and ranges. A value that is missing or wrong becomes a problem, and its smallest valid
    value stands in for it, so that the other keys can be read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.problems: dict[str, str] = {}
        """Messages by keys, so that no key has two."""
        self._config = config
        self._rope_key, self._rope = self._rotary()
        for key, value in self._rope.items():
            if isinstance(value, dict):
                self._report(self._in_rope(key), value, "not a single value: all layers have the same rotary embedding here")

    def _rotary(self) -> tuple[str, dict[str, Any]]:
        """Return the key and the value of the rotary embedding: rope_scaling in transformers 4, which has rope_theta beside it, and
        rope_parameters in version 5. Two values that differ are a problem, because transformers takes one of them and ignores the other."""
        given = {}
        for key in ("rope_scaling", "rope_parameters"):
            value = self._config.get(key)
            if isinstance(value, dict) and value:
                given[key] = value
            elif value is not None and not isinstance(value, dict):
                self._report(key, value, "not an object")
        if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
            self._report(
                "rope_scaling", given["rope_scaling"], f"but rope_parameters is {shorten(given['rope_parameters'])} (give one of them)"
            )
            return "rope_scaling", {}
        return next(iter(given.items()), ("rope_scaling", {}))

    def require_harmless(self) -> None:
        """Report keys with which the files would compute another function than this model."""
        for key, (is_harmless, valid) in _HARMLESS.items():
            for name, value in ((key, self._config.get(key)), (self._in_rope(key), self._rope.get(key))):
                if value is not None and not is_harmless(value):
                    self._report(name, value, f"supported: {valid}")

    def integer(self, key: str, field: str, default: int | None = None) -> int:
        """Return an integer for a field of ModelConfig, or the default if the file has null or lacks the key."""
        value = self._config.get(key)
        return default if value is None and default is not None else self._integer(key, field, value)

    def number(self, key: str, field: str, default: float) -> float:
        """Return a number for a field of ModelConfig, or the default if the file has null or lacks the key."""
        value = self._config.get(key)
        return default if value is None else self._number(key, field, value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false, or the default if the file has null or lacks the key."""
        value = self._config.get(key)
        if value is not None and not isinstance(value, bool):
            self._report(key, value, "not true or false")
        return value if isinstance(value, bool) else default

    def head_dim(self, default: int | None, hidden_size: int, num_heads: int) -> int:
        """Return the channels of a head. Without the key they are the family's, or hidden_size / num_attention_heads."""
        derived = default or hidden_size // num_heads
        if derived == 0 and self._config.get("head_dim") is None and "hidden_size" not in self.problems:
            self._report("num_attention_heads", num_heads, f"supported: at most hidden_size ({hidden_size})")
        return self.integer("head_dim", "kv_channels", max(derived, 1))

    def rope_base(self) -> float:
        """Return the base of the rotary embedding from rope_parameters, or from the top."""
        nested = self._rope.get("rope_theta")
        if nested is None:
            return self.number("rope_theta", "rope_base", 10000.0)
        return self._number(self._in_rope("rope_theta"), "rope_base", nested)

    def rope_scaling(self) -> dict[str, Any]:
        """Return the fields of ModelConfig for rope scaling."""
        kind = next((kind for name in ("rope_type", "type") if (kind := self._rope.get(name)) is not None), "default")
        if kind == "default":
            return {}
        if kind != "llama3":
            self._report(self._in_rope("rope_type"), kind, "supported: default, llama3")
            return {}
        length = "original_max_position_embeddings"
        factors = {
            "rope_scaling_factor": "factor",
            "rope_low_frequency_factor": "low_freq_factor",
            "rope_high_frequency_factor": "high_freq_factor",
        }
        return {
            "rope_scaling": "llama3",
            **{field: self._number(self._in_rope(key), field, self._rope.get(key)) for field, key in factors.items()},
            "rope_original_length": self._integer(self._in_rope(length), "rope_original_length", self._rope.get(length)),
        }

    def conditioning(self) -> dict[str, Any]:
        """Return the fields of ModelConfig for conditioning.

        Only this project's own export has a timestep input. Its files hold the modulations, so their initial values are not used.
        """
        kind = self._config.get("conditioning")
        if kind not in (None, "none", "adaln"):
            self._report("conditioning", kind, "supported: none, adaln")
        if kind != "adaln":
            return {"conditioning": "none"}
        sizes = {key: self.integer(key, key) for key in ("condition_size", "timestep_frequency_size")}
        scale = self.number("timestep_scale", "timestep_scale", 1000.0)
        return {"adaln_init": "identity", "conditioning": kind, **sizes, "timestep_scale": scale}

    def _in_rope(self, key: str) -> str:
        return f"{self._rope_key}.{key}"

    def _integer(self, key: str, field: str, value: Any) -> int:
        if type(value) is int and value in _RANGES[field]:
            return value
        self._report(key, value, f"not {_RANGES[field].words(value) if type(value) is int else 'an integer'}")
        return int(_RANGES[field].minimum)

    def _number(self, key: str, field: str, value: Any) -> float:
        if is_number(value) and value in _RANGES[field]:
            return float(value)
        self._report(key, value, f"not {_RANGES[field].words(value) if is_number(value) else 'a number'}")
        return 1.0

    def _report(self, key: str, value: Any, valid: str) -> None:
        """Keep the first message of a key: it is missing, or has a value that is not valid."""
        separator = "; " if valid.startswith("supported") else ", "
        message = f"{key} is missing" if value is None else f"{key} is {shorten(value)}{separator}{valid}"
        self.problems.setdefault(key, message)


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
