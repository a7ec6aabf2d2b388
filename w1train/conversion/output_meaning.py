"""The keys of an exported config.json that say what the model's outputs mean."""

from __future__ import annotations

from typing import Any

import torch

from w1train.config.errors import UserError
from w1train.config.schema import Config
from w1train.diffusion.processes import noise_process
from w1train.objectives.description import num_streams


def meaning_of_outputs(config: Config) -> dict[str, Any]:
    """Return the keys of config.json without which a reader would misread the outputs of a model, or give it other inputs than in training.

    An autoregressive model is one of causal blocks of one token, whose output at a position predicts the next token.

    Args:
        config: the run's configuration at the stage of the checkpoint.
    """
    diffusion, process = config.diffusion, noise_process(config.diffusion)
    keys: dict[str, Any] = {"process": process.name, "prediction": "full", "shift": diffusion.shift}
    if process.predicts_every_token:
        # Outputs at tokens that are no masks mean another distribution if the model was not taught the full one.
        keys["prediction"] = diffusion.prediction
    if process.is_causal:
        blocks = {"block_size": 1, "block_index": "document", "clean_attention": "token_causal", "noisy_attention": "causal"}
        return {**keys, "prediction": "next_token", "shift": True, **blocks}
    if num_streams(config) == 1:
        return {**keys, "block_size": None, "block_index": None, "clean_attention": None, "noisy_attention": "bidirectional"}
    names = ("block_size", "block_index", "clean_attention", "noisy_attention")
    return keys | {name: getattr(diffusion, name) for name in names}


def require_timesteps_of_masks(config: Config) -> None:
    """Refuse a model whose exported code would give it other timesteps or another attention mask than training did.

    The code takes the share of mask tokens for t, and a block with masks for a noisy block, and config.json has no schedule. A model
    without conditioning does not read t.

    Raises:
        UserError: the model reads t, and the process has another t at some share of masks; or noisy blocks can be without masks, and see
            other tokens than clean blocks.
    """
    process, diffusion = noise_process(config.diffusion), config.diffusion
    differ = (diffusion.clean_attention == "block_causal") != (diffusion.noisy_attention == "bidirectional")
    if process.predicts_every_token and num_streams(config) == 2 and differ:
        raise UserError(
            f"in {process.name} (diffusion.objective={diffusion.objective}) a noisy block can be without mask tokens, by which an export "
            "with --format w1 would know it, and noisy blocks of this model see other tokens than clean blocks do"
        )
    if process.is_causal or config.model.conditioning == "none":
        return
    probabilities = torch.linspace(0, 1, 11, dtype=torch.float64)
    if process.predicts_every_token or not torch.allclose(process.timestep_at(probabilities), probabilities):
        raise UserError(
            f"this model reads t, and t is not the share of mask tokens in {process.name} (diffusion.objective={diffusion.objective}, "
            f"diffusion.noise_schedule={diffusion.noise_schedule}). An export with --format w1 takes this share, so its outputs would be "
            "wrong. Only a model with model.conditioning=none, or with a process whose t is this share, can be exported in this format"
        )
