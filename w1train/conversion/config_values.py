"""The values of a config.json of Hugging Face by their types and ranges."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from w1train.config.errors import listing
from w1train.config.field_types import field_ranges
from w1train.config.reading import is_number, shorten
from w1train.config.schema import ModelConfig
from w1train.config.schema_model import ExpertsConfig


def _is_full_attention(layer_types: Any) -> bool:
    return isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)


_ROTARY_FACTOR = "partial_rotary_factor"
# Keys that can make the files compute another function than this model. Each key has a test of whether a value is harmless (null always
# is), and the valid values in words.
_HARMLESS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_act": (lambda value: value in ("silu", "swish"), "silu"),
    "attention_bias": (lambda value: value is False, "false: here only queries, keys and values may have biases (Qwen2)"),
    "mlp_bias": (lambda value: value is False, "false"),
    "use_bias": (lambda value: value is False, "false"),
    "norm_head": (lambda value: value is False, "false"),
    "norm_softmax": (lambda value: value is False, "false"),
    "use_rmsnorm": (lambda value: value is True, "true"),
    "clip_qkv": (lambda value: False, "null"),
    "use_sliding_window": (lambda value: value is False, "false: attention sees whole documents"),
    "layer_types": (_is_full_attention, "full_attention in every layer"),
    _ROTARY_FACTOR: (lambda value: is_number(value) and value == 1, "1: all channels are rotated"),
    "quantization_config": (lambda value: False, "absent: weights in float32, bfloat16 or float16"),
}
_RANGES = {**field_ranges(ModelConfig), **{f"experts.{name}": values for name, values in field_ranges(ExpertsConfig).items()}}
"""Ranges of the fields of ModelConfig, and of its experts under names such as ``experts.num_experts``."""

_TYPES_OF: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int, float), float: (int, float), str: (str,)}
"""The types in JSON of a value that equals a value of Python: 1.0 is 1, and true is not."""


class ConfigValues:
    """The values of a config.json by their types and ranges. A value that is missing or wrong becomes a problem, and its smallest valid
    value stands in for it, so that the other keys can be read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.problems: dict[str, str] = {}
        """Messages by keys, so that no key has two."""
        experts = config.get("experts")
        inner = {f"experts.{key}": value for key, value in experts.items()} if isinstance(experts, dict) else {}
        self._config = {**config, **inner}
        self._rope_key, self._rope = self._rotary()
        for key, value in self._rope.items():
            if isinstance(value, dict):
                self.report(self._in_rope(key), value, "not a single value: all layers have the same rotary embedding here")

    def _rotary(self) -> tuple[str, dict[str, Any]]:
        """Return the key and the value of the rotary embedding: rope_scaling in transformers 4, which has rope_theta beside it, and
        rope_parameters in version 5. Two values that differ are a problem, because transformers takes one of them and ignores the other."""
        given = {}
        for key in ("rope_scaling", "rope_parameters"):
            value = self._config.get(key)
            if isinstance(value, dict) and value:
                given[key] = value
            elif value is not None and not isinstance(value, dict):
                self.report(key, value, "not an object")
        if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
            self.report(
                "rope_scaling", given["rope_scaling"], f"but rope_parameters is {shorten(given['rope_parameters'])} (give one of them)"
            )
            return "rope_scaling", {}
        return next(iter(given.items()), ("rope_scaling", {}))

    def require_harmless(self, *, may_rotate_part: bool) -> None:
        """Report keys with which the files would compute another function than this model.

        Args:
            may_rotate_part: models of the family may rotate a part of the channels (``rotary_channels`` reads the key).
        """
        for key, (is_harmless, valid) in _HARMLESS.items():
            if may_rotate_part and key == _ROTARY_FACTOR:
                continue
            for name, value in ((key, self._config.get(key)), (self._in_rope(key), self._rope.get(key))):
                if value is not None and not is_harmless(value):
                    self.report(name, value, f"supported: {valid}")

    def given(self, *keys: str) -> str:
        """Return which of several names of one key the file has; the first name if it lacks them all. Two names with different values are a
        problem."""
        found = [key for key in keys if self._config.get(key) is not None]
        for other in found[1:]:
            if self._config[other] != self._config[found[0]]:
                self.report(other, self._config[other], f"but {found[0]} is {shorten(self._config[found[0]])} (give one of them)")
        return found[0] if found else keys[0]

    def raw(self, key: str) -> Any:
        """Return the value as it is in the file; None if the file has null or lacks the key."""
        return self._config.get(key)

    def has_valid(self, *keys: str) -> bool:
        """Tell whether no problem of these keys has been reported, so that their values can be compared with each other."""
        return not any(key in self.problems for key in keys)

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
            self.report(key, value, "not true or false")
        return value if isinstance(value, bool) else default

    def choice(self, key: str, valid: Sequence[str], default: str | None = None) -> str:
        """Return one of some words, or the default if the file has null or lacks the key."""
        value = self._config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in valid:
            self.report(key, value, f"supported: {listing(valid)}")
            return valid[0]
        return value

    def require(self, key: str, *valid: Any) -> None:
        """Report a value that is given and is not one of the valid values, which this model has too."""
        value = self._config.get(key)
        if value is not None and not any(type(value) in _TYPES_OF[type(each)] and value == each for each in valid):
            self.report(key, value, f"supported: {listing(map(json.dumps, valid))}")

    def num_first_layers(self, key: str) -> int:
        """Return how many of the first layers a list of layers names; null = no layer."""
        layers = self._config.get(key)
        if layers is None:
            return 0
        if not isinstance(layers, list) or any(type(layer) is not int for layer in layers) or layers != list(range(len(layers))):
            self.report(key, layers, "supported: the first layers, such as [0, 1]")
            return 0
        return len(layers)

    def rotary_channels(self, channels: int) -> int | None:
        """Return the channels that the rotary embedding turns, of all ``channels`` of a head; None = all of them."""
        self._require_once(_ROTARY_FACTOR)
        in_rope = self._config.get(_ROTARY_FACTOR) is None and self._rope.get(_ROTARY_FACTOR) is not None
        key = self._in_rope(_ROTARY_FACTOR) if in_rope else _ROTARY_FACTOR
        factor, size = (self._rope if in_rope else self._config).get(_ROTARY_FACTOR), self._config.get("rotary_dim")
        if size is not None:
            size = self._integer("rotary_dim", "rotary_channels", size)
        if (factor is None and size is None) or (factor is not None and not (is_number(factor) and 0 < factor <= 1)):
            self.report(key, factor, "not a number > 0 and <= 1")
        elif factor is not None and self.has_valid("rotary_dim", "head_dim"):
            rotated = int(channels * factor)
            if size not in (None, rotated) or rotated == 0:
                self.report(key, factor, f"but of {channels} channels it rotates {rotated}, and rotary_dim is {size}")
            size = rotated
        return None if size == channels else size

    def head_dim(self, default: int | None, hidden_size: int, num_heads: int) -> int:
        """Return the channels of a head. Without the key they are the family's, or hidden_size / num_attention_heads."""
        derived = default or hidden_size // num_heads
        if derived == 0 and self._config.get("head_dim") is None and "hidden_size" not in self.problems:
            self.report("num_attention_heads", num_heads, f"supported: at most hidden_size ({hidden_size})")
        return self.integer("head_dim", "kv_channels", max(derived, 1))

    def rope_base(self) -> float:
        """Return the base of the rotary embedding from rope_parameters, or from the top."""
        nested = self._rope.get("rope_theta")
        if nested is None:
            return self.number("rope_theta", "rope_base", 10000.0)
        base = self._number(self._in_rope("rope_theta"), "rope_base", nested)
        self._require_once("rope_theta")
        return base

    def rope_scaling(self) -> dict[str, Any]:
        """Return the fields of ModelConfig for rope scaling."""
        kinds = [(name, kind) for name in ("rope_type", "type") if (kind := self._rope.get(name)) is not None]
        kind = kinds[0][1] if kinds else "default"
        if kinds and kinds[-1][1] != kind:
            self.report(self._in_rope("type"), kinds[-1][1], f"but {self._in_rope('rope_type')} is {shorten(kind)} (give one of them)")
        if kind == "default":
            return {}
        if kind != "llama3":
            self.report(self._in_rope("rope_type"), kind, "supported: default, llama3")
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
            self.report("conditioning", kind, "supported: none, adaln")
        if kind != "adaln":
            return {"conditioning": "none"}
        sizes = {key: self.integer(key, key) for key in ("condition_size", "timestep_frequency_size")}
        scale = self.number("timestep_scale", "timestep_scale", 1000.0)
        return {"adaln_init": "identity", "conditioning": kind, **sizes, "timestep_scale": scale}

    def _require_once(self, key: str) -> None:
        """Report two numbers of a key that differ, at the top and in the rotary embedding: programs differ in which of them they take."""
        top, nested = self._config.get(key), self._rope.get(key)
        if is_number(top) and is_number(nested) and top != nested:
            self.report(key, top, f"but {self._in_rope(key)} is {shorten(nested)} (give one of them)")

    def _in_rope(self, key: str) -> str:
        return f"{self._rope_key}.{key}"

    def _integer(self, key: str, field: str, value: Any) -> int:
        if type(value) is int and value in _RANGES[field]:
            return value
        self.report(key, value, f"not {_RANGES[field].words(value) if type(value) is int else 'an integer'}")
        return int(_RANGES[field].minimum)

    def _number(self, key: str, field: str, value: Any) -> float:
        if is_number(value) and value in _RANGES[field]:
            return float(value)
        self.report(key, value, f"not {_RANGES[field].words(value) if is_number(value) else 'a number'}")
        return 1.0

    def report(self, key: str, value: Any, valid: str) -> None:
        """Keep the first message of a key: it is missing, or has a value that is not valid."""
        separator = "; " if valid.startswith("supported") else ", "
        message = f"{key} is missing" if value is None else f"{key} is {shorten(value)}{separator}{valid}"
        self.problems.setdefault(key, message)
