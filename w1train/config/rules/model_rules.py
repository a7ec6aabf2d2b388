"""Rules of the model's sizes."""

from __future__ import annotations

from collections.abc import Iterator

from w1train.config.errors import Problem, show
from w1train.config.rules.divisibility import divisors, does_not_divide
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config


def _query_groups_rule(config: Config) -> Iterator[Problem]:
    heads, groups = config.model.num_attention_heads, config.model.num_query_groups
    if groups is not None and does_not_divide(groups, heads):
        valid = f"a divisor of model.num_attention_heads ({heads}): {divisors(heads)}; or null"
        yield Problem("model.num_query_groups", show(groups), valid)


def _head_width_rule(config: Config) -> Iterator[Problem]:
    hidden, heads, channels = config.model.hidden_size, config.model.num_attention_heads, config.model.kv_channels
    even = "an even number: the rotary embedding rotates pairs of channels"
    if channels is not None:
        if channels > 0 and channels % 2:
            yield Problem("model.kv_channels", show(channels), even, f"{channels + 1}")
    elif does_not_divide(heads, hidden):
        valid = f"a divisor of model.hidden_size ({hidden}): {divisors(hidden)}; or any number if model.kv_channels is set"
        yield Problem("model.num_attention_heads", show(heads), valid)
    elif heads > 0 and hidden // heads % 2:
        found = f"null, so hidden_size / num_attention_heads = {hidden} / {heads} = {hidden // heads}"
        yield Problem("model.kv_channels", found, even, f"{hidden // heads + 1}")


def _rotary_channels_rule(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.rotary_channels is None or model.num_attention_heads < 1:
        return
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    if model.rotary_channels % 2 or model.rotary_channels > width:
        valid = f"an even number up to the {width} channels of a head, because pairs of channels are rotated; or null"
        even = min(model.rotary_channels + 1, width) // 2 * 2
        yield Problem("model.rotary_channels", show(model.rotary_channels), valid, str(even) if even > 0 else None)


def _rope_scaling_rule(config: Config) -> Iterator[Problem]:
    model = config.model
    low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
    if model.rope_scaling == "llama3" and high <= low:
        yield Problem("model.rope_high_frequency_factor", show(high), f"a number above model.rope_low_frequency_factor ({show(low)})")


def _timestep_frequency_rule(config: Config) -> Iterator[Problem]:
    size = config.model.timestep_frequency_size
    if size % 2:
        yield Problem(
            "model.timestep_frequency_size", show(size), "an even number: half of the channels are sines, half are cosines", f"{size + 1}"
        )


def _sequence_length_rule(config: Config) -> Iterator[Problem]:
    length, longest = config.data.sequence_length, config.model.max_sequence_length
    if length > longest:
        yield Problem("data.sequence_length", show(length), f"at most model.max_sequence_length ({longest})")


MODEL_RULES: tuple[Rule, ...] = (
    _query_groups_rule,
    _head_width_rule,
    _rotary_channels_rule,
    _rope_scaling_rule,
    _timestep_frequency_rule,
    _sequence_length_rule,
)
