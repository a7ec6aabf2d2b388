"""The rules that relate loss, weight, positions, prediction and noise process, of one stage.

The configuration cannot import processes and losses, so ``w1train.registered_names`` calls these rules.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from w1train.config.errors import Problem, show
from w1train.config.schema import Config
from w1train.diffusion.process import NoiseProcess
from w1train.diffusion.processes import noise_process
from w1train.objectives.losses import LOSSES
from w1train.objectives.objective import objective_of
from w1train.objectives.row_loss import RowLoss


def objective_problems(config: Config) -> Iterator[Problem]:
    """Yield what cannot be trained together, for a process and a loss that are registered. A causal process ignores the fields of noise."""
    diffusion = config.diffusion
    process = noise_process(diffusion)
    if process.is_causal:
        return
    loss = LOSSES[diffusion.loss]
    yield from loss.problems(config, process)
    yield from _prediction_problems(config, process, loss)
    yield from _position_problems(config, loss)
    yield from _cross_entropy_problems(config)
    yield from _weight_problems(config, process)
    yield from _measurement_problems(config)


def _prediction_problems(config: Config, process: NoiseProcess, loss: type[RowLoss]) -> Iterator[Problem]:
    """Report a prediction that the loss does not teach. If noise is on the mask token alone, both predictions are the same."""
    prediction, taught = config.diffusion.prediction, loss.taught(config)
    if process.predicts_every_token and taught not in (None, prediction):
        how = f"diffusion.loss={config.diffusion.loss} with diffusion.loss_positions={config.diffusion.loss_positions}"
        valid = f"{taught}, which is what {how} teaches in {process.name}"
        yield Problem("diffusion.prediction", prediction, valid, f"diffusion.prediction={taught}")
    elif process.bound == "kl_is" and prediction == "full" and config.diffusion.num_timesteps > 0:
        valid = "0 with diffusion.prediction=full: the bound of steps, which is always logged, takes leave_one_out predictions"
        yield Problem("diffusion.num_timesteps", show(config.diffusion.num_timesteps), valid, "diffusion.num_timesteps=0")


def _position_problems(config: Config, loss: type[RowLoss]) -> Iterator[Problem]:
    positions = config.diffusion.loss_positions
    if loss.positions == "all" and positions not in ("auto", "all"):
        valid = f"auto: diffusion.loss={config.diffusion.loss} is made of all tokens, and a part of them teaches another distribution"
        yield Problem("diffusion.loss_positions", positions, valid, "diffusion.loss_positions=auto")


def _cross_entropy_problems(config: Config) -> Iterator[Problem]:
    """Report changes of the cross-entropy, and what is added to it, with another loss."""
    for field in ("focal_gamma", "label_smoothing", "confidence_weight"):
        value = getattr(config.diffusion, field)
        if value > 0 and config.diffusion.loss != "cross_entropy":
            valid = f"0 with diffusion.loss={config.diffusion.loss}: it belongs to the cross-entropy"
            yield Problem(f"diffusion.{field}", show(value), valid, f"diffusion.{field}=0, or diffusion.loss=cross_entropy")


def _weight_problems(config: Config, process: NoiseProcess) -> Iterator[Problem]:
    diffusion, weight = config.diffusion, config.diffusion.weight
    if diffusion.weight_max is not None and diffusion.weight_min > diffusion.weight_max:
        valid = f"at most diffusion.weight_max ({show(diffusion.weight_max)})"
        yield Problem("diffusion.weight_min", show(diffusion.weight_min), valid)
    has_blocks = diffusion.block_size is not None and diffusion.block_size < config.data.sequence_length
    if weight == "cart" and (process.predicts_every_token or has_blocks):
        found = f"cart in {process.name}" if process.predicts_every_token else f"cart with blocks of {diffusion.block_size} tokens"
        valid = "another weight: cart counts the visible tokens around a mask, in masked diffusion of whole documents"
        yield Problem("diffusion.weight", found, valid, "diffusion.weight=constant")
    if weight == "gidd_dynamic" and (diffusion.loss != "kl_is" or process.bound != "kl_is"):
        valid = "a weight such as constant: gidd_dynamic compares clean, wrong and masked tokens, for diffusion.loss=kl_is"
        yield Problem(
            "diffusion.weight", f"gidd_dynamic with diffusion.loss={diffusion.loss} in {process.name}", valid, "diffusion.weight=constant"
        )
    elif weight == "gidd_dynamic" and not process.word_noise(torch.tensor([diffusion.t_min, diffusion.t_max], dtype=torch.float64)).all():
        valid = "another weight: gidd_dynamic compares tokens with wrong tokens, which this noise never puts anywhere"
        yield Problem("diffusion.weight", "gidd_dynamic with noise on the mask token alone", valid, "diffusion.weight=log_snr")


def _measurement_problems(config: Config) -> Iterator[Problem]:
    """Report noise on embeddings, which only the pass with gradients has, beside a loss that needs sums of the pass before it."""
    noise = config.diffusion.mask_embedding_noise
    if noise > 0 and objective_of(config.diffusion, 1).is_measured:
        valid = "0 with an objective that measures the model before each step: the measured model would have no such noise"
        yield Problem("diffusion.mask_embedding_noise", show(noise), valid, "diffusion.mask_embedding_noise=0")
