"""Facts about what a configuration trains, which several parts of the program ask for."""

from __future__ import annotations

from w1train.config.schema import Config
from w1train.diffusion.processes import noise_process
from w1train.objectives.objective import objective_at


def num_streams(config: Config) -> int:
    """Return 2 for block diffusion and 1 otherwise. Where one block holds the whole sequence, no token sees the clean stream, so it is not
    computed."""
    diffusion = config.diffusion
    if noise_process(diffusion).is_causal or diffusion.block_size is None:
        return 1
    return 1 if diffusion.block_size >= config.data.sequence_length else 2


def block_size(config: Config) -> int:
    """Return how many tokens are denoised together: 1 for autoregression, the sequence for masked diffusion."""
    if noise_process(config.diffusion).is_causal:
        return 1
    length = config.data.sequence_length
    return min(config.diffusion.block_size or length, length)


def samples_are_segments(config: Config) -> bool:
    """Return whether all tokens of a sample are at one timestep, so that no index of segments is needed for the modulation."""
    diffusion = config.diffusion
    return num_streams(config) == 1 and (diffusion.timestep_per == "sequence" or noise_process(diffusion).is_causal)


def num_measuring_passes(config: Config) -> int:
    """Return the passes without gradients over the micro-batches of a step (w1train/training/measurement.py): that of the model, and with
    preferences that of the reference too."""
    return int(objective_at(config).is_measured) + int(config.diffusion.preference_draws > 0)


def describe_objective(config: Config) -> str:
    """Describe the objective in words, for logs and tables."""
    process, size = noise_process(config.diffusion), block_size(config)
    schedule = config.diffusion.noise_schedule
    name = process.name if schedule == "linear" or process.is_causal else f"{process.name} with the schedule {schedule}"
    if process.is_causal or size == config.data.sequence_length:
        return name
    tokens = "1 token" if size == 1 else f"{size} tokens"
    return f"{'block diffusion' if name == 'masked diffusion' else name}, {tokens} a block"
