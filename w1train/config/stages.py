"""The configuration of a stage of the schedule."""

from __future__ import annotations

import dataclasses

from w1train.config.schema import Config


def at_stage(config: Config, name: str) -> Config:
    """Return the run's configuration with the stage's own values of diffusion and batch size. All other sections are shared, not copied."""
    stage = config.schedule.stages[name]
    if not stage.diffusion and stage.global_batch_size is None:
        return config
    batch = config.training.global_batch_size if stage.global_batch_size is None else stage.global_batch_size
    return dataclasses.replace(
        config,
        diffusion=dataclasses.replace(config.diffusion, **stage.diffusion),
        training=dataclasses.replace(config.training, global_batch_size=batch),
    )


def has_preferences(config: Config) -> bool:
    """Return whether a stage of the run trains preferences, which need a reference."""
    return any(at_stage(config, name).diffusion.preference_draws > 0 for name in config.schedule.stages)


def batch_sizes(config: Config) -> dict[str, int]:
    """Return every global batch size of the run by its key."""
    sizes = {"training.global_batch_size": config.training.global_batch_size}
    for name, stage in config.schedule.stages.items():
        if stage.global_batch_size is not None:
            sizes[f"schedule.stages.{name}.global_batch_size"] = stage.global_batch_size
    return sizes
