"""What a configuration trains, as facts that several parts ask for."""

from __future__ import annotations

from w1train.config.schema import Config


def num_streams(config: Config) -> int:
    """Two for block diffusion, unless one block holds the whole sequence: then no token sees the clean stream, and it is not
    computed."""
    diffusion = config.diffusion
    if diffusion.objective == "autoregressive" or diffusion.block_size is None:
        return 1
    return 1 if diffusion.block_size >= config.data.sequence_length else 2


def block_size(config: Config) -> int:
    """Tokens denoised together: 1 for autoregression, the sequence for masked diffusion."""
    if config.diffusion.objective == "autoregressive":
        return 1
    length = config.data.sequence_length
    return min(config.diffusion.block_size or length, length)


def samples_are_segments(config: Config) -> bool:
    """Whether all of a sample is at one timestep, so that its modulation needs no index."""
    diffusion = config.diffusion
    return num_streams(config) == 1 and (diffusion.timestep_per == "sequence" or diffusion.objective == "autoregressive")


def describe_objective(config: Config) -> str:
    """For people."""
    if config.diffusion.objective == "autoregressive":
        return "autoregressive"
    size = block_size(config)
    return "masked diffusion" if size == config.data.sequence_length else f"block diffusion, {size} tokens a block"
