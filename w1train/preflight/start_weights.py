"""The check of the weights that a new run begins from, and of those of its reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from w1train.checkpoints.manifest import CONFIG
from w1train.config.errors import Problem, UserError
from w1train.config.rules.value_rules import has_valid_values
from w1train.config.schema import Config, ModelConfig
from w1train.config.schema_adapters import AdaptersConfig
from w1train.config.serialization import config_from_yaml
from w1train.config.stages import has_preferences
from w1train.conversion.families import model_from_config, read_config
from w1train.conversion.model_fit import adapter_problems, find_checkpoint, model_problems
from w1train.preflight.disks import has_checkpoint
from w1train.preflight.next_command import absolute

_KEY = "training.initial_weights"
_REFERENCE_KEY = "reference.weights"
_VALID = "a Hugging Face directory (config.json and *.safetensors), a run directory or a checkpoint"
_HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")


def weights_rule(config: Config) -> Iterator[Problem]:
    """Check that the weights are there, and are those of the model. A run that resumes does not read its initial weights, unless they are
    those of its reference."""
    initial, reference = config.training.initial_weights, config.reference.weights
    resumes = has_checkpoint(config) or config.checkpoint.upload is not None
    is_reference = reference is None and has_valid_values(config) and has_preferences(config)
    if initial is not None and (not resumes or is_reference):
        yield from _problems(config, _KEY, initial)
    if reference is not None and reference != initial:
        yield from _problems(config, _REFERENCE_KEY, reference)


def _problems(config: Config, key: str, typed: str) -> Iterator[Problem]:
    path = Path(absolute(typed))
    try:
        checkpoint = find_checkpoint(path)
        run = None if checkpoint is None else config_from_yaml(checkpoint / CONFIG)
        stored = _hugging_face_model(path) if run is None else run.model
    except (UserError, OSError) as error:
        yield Problem(key, str(error).removeprefix(f"{_KEY}: "), _VALID, _download(typed))
        return
    if has_valid_values(config):
        yield from model_problems(config.model, stored, str(path))
        yield from adapter_problems(config.model, config.adapters, AdaptersConfig() if run is None else run.adapters, str(path))
    if checkpoint is None and find_spec("safetensors") is None:
        yield Problem(key, f"{path}, and no package safetensors", "weights of Hugging Face need it", "pip install 'w1train[hf]'")


def _hugging_face_model(path: Path) -> ModelConfig:
    model = model_from_config(read_config(path), str(path))
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{path} has no *.safetensors")
    return model


def _download(typed: str) -> str | None:
    """Return the command that downloads a model, if its name on the Hugging Face hub was typed in the place of a path."""
    if Path(typed).exists() or not _HUB_NAME.fullmatch(typed):
        return None
    return f"if it is a model of the Hugging Face hub: hf download {typed} --local-dir {absolute(typed)}"
