"""The registration of losses, and the loss and the bound of a configuration."""

from __future__ import annotations

from w1train.config.errors import look_up
from w1train.config.schema import DiffusionConfig
from w1train.diffusion.processes import noise_process
from w1train.objectives.cross_entropy_loss import PlainCrossEntropy, TrainedCrossEntropy
from w1train.objectives.finite_kl import FiniteKlLoss
from w1train.objectives.kl_is import KlIsLoss
from w1train.objectives.learned_per_id import LearnedPerIdLoss
from w1train.objectives.per_id import PerIdLoss
from w1train.objectives.reconstruction import ReconstructionLoss
from w1train.objectives.row_loss import RowLoss
from w1train.objectives.score_entropy_loss import ScoreEntropyLoss

LOSSES: dict[str, type[RowLoss]] = {
    "cross_entropy": TrainedCrossEntropy,
    "kl_is": KlIsLoss,
    "finite_kl": FiniteKlLoss,
    "score_entropy": ScoreEntropyLoss,
    "per_id": PerIdLoss,
    "reconstruction": ReconstructionLoss,
}
"""The loss of each value of diffusion.loss."""

BOUNDS: dict[str, type[RowLoss]] = {"cross_entropy": PlainCrossEntropy, "kl_is": KlIsLoss, "per_id": PerIdLoss}
"""The bound in continuous time for each value of NoiseProcess.bound."""

OWN_BOUNDS = ("finite_kl", "score_entropy")
"""Losses that are the bound of their models: in discrete time, and where the outputs are scores, the bounds of BOUNDS are those of other
models."""


def loss_of(config: DiffusionConfig) -> RowLoss:
    """Return the loss that is trained. Autoregression has the cross-entropy, whatever the fields of noise say."""
    process = noise_process(config)
    if process.is_causal:
        return PlainCrossEntropy(config, process)
    loss = look_up(LOSSES, "diffusion.loss", config.loss)
    return LearnedPerIdLoss(config, process) if loss is PerIdLoss and process.learns_rates else loss(config, process)


def bound_of(config: DiffusionConfig) -> RowLoss:
    """Return the loss that bounds the likelihood, whatever is trained."""
    process = noise_process(config)
    if config.loss in OWN_BOUNDS and not process.is_causal:
        return LOSSES[config.loss](config, process)
    # The last step is at t = 1, where the weight of the bound in continuous time is infinite.
    if config.num_timesteps > 0 and process.bound == "kl_is":
        return FiniteKlLoss(config, process)
    return LearnedPerIdLoss(config, process) if process.learns_rates else BOUNDS[process.bound](config, process)
