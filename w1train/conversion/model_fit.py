"""The kinds of stored weights, and the comparison of their model with the model of a run. This module reads no weights and does not need
torch, so that a start can be refused before torch is imported."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

from w1train.checkpoints.checkpoint_names import step_path
from w1train.checkpoints.manifest import MANIFEST, latest_step
from w1train.config.errors import Problem, UserError, show
from w1train.config.schema import ModelConfig
from w1train.config.schema_adapters import AdaptersConfig, is_adapted, linear_names
from w1train.conversion.expert_keys import compared_fields
from w1train.conversion.families import CONFIG_FILE

# Fields that must be equal in the stored model. The vocabulary and adaLN have rules of their own. The longest sequence may
# differ, because it only says how the model is used.
_SAME = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "rope_base",
    "rope_scaling",
    "norm_epsilon",
    "qk_norm",
    "qkv_bias",
    "tie_embeddings",
    "learns_noise_rates",
)
_MAY_DIFFER = ("experts.pool_per_block",)
"""Fields of experts that say how the weights are used, and that a run may choose."""
_SAME_IN_LLAMA3 = ("rope_scaling_factor", "rope_low_frequency_factor", "rope_high_frequency_factor", "rope_original_length")
_SAME_IN_ADALN = ("condition_size", "timestep_frequency_size", "timestep_scale")


def find_checkpoint(path: Path) -> Path | None:
    """Return a directory that is a checkpoint, or the newest checkpoint of a run directory; None for a directory with a config.json.

    Raises:
        UserError: the path is neither a checkpoint nor a run directory nor a Hugging Face directory.
    """
    if (path / MANIFEST).is_file():
        return path
    if (path / "config.yaml").is_file():
        step = latest_step(path / "checkpoints")
        if step is None:
            raise UserError(f"training.initial_weights: the run {path} has no complete checkpoint")
        return step_path(path / "checkpoints", step)
    if (path / CONFIG_FILE).is_file():
        return None
    what = f"has neither {CONFIG_FILE} (Hugging Face) nor config.yaml (a run) nor {MANIFEST} (a checkpoint)"
    raise UserError(f"training.initial_weights: {path} {what if path.is_dir() else 'is no directory'}")


def model_problems(model: ModelConfig, stored: ModelConfig, origin: str) -> list[Problem]:
    """Return the fields of a configured model that must be as in the stored model, but are not. ``origin`` names the stored model."""
    both_conditioned = model.conditioning == stored.conditioning == "adaln"
    fields = [*_SAME, *(_SAME_IN_LLAMA3 if stored.rope_scaling == "llama3" else ()), *(_SAME_IN_ADALN if both_conditioned else ())]
    if not _has_dense_layers(model) and not _has_dense_layers(stored):
        fields.remove("ffn_hidden_size")
    ours, theirs = ({name: _resolved(each, name) for name in fields} | compared_fields(each) for each in (model, stored))
    problems = [
        Problem(f"model.{name}", show(_value(model, name)), f"{show(value)}, as in {origin}")
        for name, value in theirs.items()
        if name not in _MAY_DIFFER and ours.get(name, _value(model, name)) != value
    ]
    if model.vocab_size < stored.vocab_size:
        problems.append(Problem("model.vocab_size", show(model.vocab_size), f"at least {stored.vocab_size}, the rows of {origin}"))
    if model.conditioning == "none" and stored.conditioning == "adaln":
        problems.append(
            Problem("model.conditioning", "none", f"adaln, as in {origin}: without its modulation the model computes another function")
        )
    elif model.conditioning == "adaln" and stored.conditioning == "none" and model.adaln_init != "identity":
        identity = f"identity, because {origin} has no adaLN: with gates of zero, no layer would have an effect"
        problems.append(Problem("model.adaln_init", model.adaln_init, identity))
    return problems


def adapter_problems(model: ModelConfig, adapters: AdaptersConfig, stored: AdaptersConfig, origin: str) -> list[Problem]:
    """Return the fields of the configured adapters that must be as in the stored model, whose adapters would be trained on. If one of the
    models has no adapters, there is no problem: stored adapters are added to the base, and new adapters begin as zero."""
    if not adapters.rank or not stored.rank:
        return []
    ours, theirs = ([name for name in linear_names(model) if is_adapted(name, each)] for each in (adapters, stored))
    values = {
        **{f"adapters.{name}": (getattr(adapters, name), getattr(stored, name)) for name in ("rank", "alpha", "rank_stabilized")},
        "adapters.modules": (adapters.modules if ours != theirs else stored.modules, stored.modules),
    }
    instead = "export the run with `w1train convert to-hf`, which adds its adapters to the base, to begin with new adapters"
    return [
        Problem(key, show(found), f"{show(wanted)}, as in {origin}, whose adapters are trained on", instead)
        for key, (found, wanted) in values.items()
        if found != wanted
    ]


def _has_dense_layers(model: ModelConfig) -> bool:
    return not model.experts.num_experts or model.experts.num_dense_layers > 0


def _value(model: ModelConfig, name: str) -> object:
    """Return the value of a field such as ``experts.score`` as it is configured."""
    return attrgetter(name)(model)


def _resolved(model: ModelConfig, field: str) -> object:
    value = getattr(model, field)
    if value is None and field == "num_query_groups":
        return model.num_attention_heads
    if value is None and field == "kv_channels":
        return model.hidden_size // model.num_attention_heads
    return value
