"""The registration of the noise processes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from w1train.config.errors import look_up
from w1train.config.schema import DiffusionConfig
from w1train.diffusion.autoregressive import AutoregressiveProcess
from w1train.diffusion.edits import EditsProcess
from w1train.diffusion.hybrid import HybridProcess
from w1train.diffusion.learned_masked import LearnedMaskedProcess
from w1train.diffusion.log_snr import LogSnrProcess
from w1train.diffusion.masked import MaskedProcess
from w1train.diffusion.noise_ids import NoiseIds
from w1train.diffusion.per_id_masked import PerIdMaskedProcess, Spindle
from w1train.diffusion.process import NoiseProcess
from w1train.diffusion.schedules import SCHEDULES, Schedule
from w1train.diffusion.token_to_token import TokenToTokenProcess
from w1train.diffusion.uniform import UniformProcess

PROCESSES: dict[str, Callable[[DiffusionConfig], NoiseProcess]] = {
    "diffusion": lambda config: MaskedProcess(config.mask_token_id, noise_schedule(config)),
    "autoregressive": lambda config: AutoregressiveProcess(),
    "uniform": lambda config: UniformProcess(NoiseIds.of(config), noise_schedule(config)),
    "hybrid": lambda config: HybridProcess(config.mask_token_id, config.num_noise_ids, config.uniform_share, config.hybrid_gamma),
    "log_snr": lambda config: LogSnrProcess(config.mask_token_id, config.num_noise_ids, config.log_snr_slope, config.log_snr_shift),
    "per_id_masked": lambda config: PerIdMaskedProcess(
        config.mask_token_id, spindle=Spindle(config.spindle_scale), token_counts=config.token_counts
    ),
    "edits": lambda config: EditsProcess(
        config.mask_token_id,
        ids=NoiseIds(config.num_noise_ids, config.mask_token_id),
        edited_share=config.edited_share,
        edit_rate=config.edit_rate,
    ),
    "token_to_token": lambda config: TokenToTokenProcess(
        config.mask_token_id, config.num_noise_ids, config.uniform_share, noise_schedule(config)
    ),
    "learned_masked": lambda config: LearnedMaskedProcess(config.mask_token_id),
}
"""The process of each value of diffusion.objective."""


def noise_process(config: DiffusionConfig, rates: Tensor | None = None) -> NoiseProcess:
    """Return the noise process that a configuration asks for. Raise ConfigurationError if no process has this name.

    Args:
        rates: [vocabulary], the rates of noise that the model has learned; None = the model learns none, or nobody asks for them.
    """
    process = look_up(PROCESSES, "diffusion.objective", config.objective)(config)
    return process if rates is None else process.with_rates(rates)


def noise_schedule(config: DiffusionConfig) -> Schedule:
    """Return the schedule that a configuration asks for. Raise ConfigurationError if no schedule has this name."""
    return look_up(SCHEDULES, "diffusion.noise_schedule", config.noise_schedule)(config)
