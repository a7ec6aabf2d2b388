"""The registration of the noise processes."""

from __future__ import annotations

from collections.abc import Callable

from w1train.config.errors import look_up
from w1train.config.schema import DiffusionConfig
from w1train.diffusion.autoregressive import AutoregressiveProcess
from w1train.diffusion.masked import MaskedProcess
from w1train.diffusion.process import NoiseProcess

PROCESSES: dict[str, Callable[[DiffusionConfig], NoiseProcess]] = {
    "diffusion": lambda config: MaskedProcess(config.mask_token_id),
    "autoregressive": lambda config: AutoregressiveProcess(),
}
"""The process of each value of diffusion.objective."""


def noise_process(config: DiffusionConfig) -> NoiseProcess:
    """Return the noise process that a configuration asks for. Raise ConfigurationError if no process has this name."""
    return look_up(PROCESSES, "diffusion.objective", config.objective)(config)
