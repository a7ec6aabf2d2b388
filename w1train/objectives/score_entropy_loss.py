"""The bound of a model whose outputs are the logarithms of ratios of probabilities (SEDD, arXiv 2310.16834)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from w1train.config.errors import Problem, show
from w1train.config.schema import Config
from w1train.diffusion.noise_ids import NoiseIds
from w1train.diffusion.process import NoiseProcess
from w1train.model.row_terms import RowTerm, ScoreEntropy
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.row_loss import RowLoss, timesteps_and_inputs


class ScoreEntropyLoss(RowLoss):
    """The score entropy times q_t(z | x) (SEDD, arXiv 2310.16834, definition 3.1). Under masked noise the scores are scaled, so that
    outputs that are probabilities of tokens give the cross-entropy."""

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        timesteps, inputs = timesteps_and_inputs(rows)
        alpha, input_noise = self.process.alpha(timesteps), self.process.noise(timesteps, inputs)
        # A token that noise cannot have drawn has the weight 0, and 0 times the logarithm of 0 would be NaN.
        input_noise = torch.where(input_noise > 0, input_noise, 1.0)
        return {
            "score_entropy": ScoreEntropy(
                targets=rows.targets,
                inputs=inputs,
                alpha=alpha,
                word_noise=self.process.word_noise(timesteps),
                input_noise=input_noise,
                log_scale=self._log_scale(alpha, input_noise),
            )
        }

    def _log_scale(self, alpha: Tensor, input_noise: Tensor) -> Tensor:
        """Return what is added to the outputs, float64 [m]. Under masked noise the true scores are alpha / (1 - alpha) times
        probabilities; with the number of ids in it, outputs of zero are the scores of a uniform prediction (SEDD, appendix C.2)."""
        if self.process.bound == "kl_is":
            return torch.zeros_like(alpha)
        return torch.log(alpha / input_noise) - math.log(NoiseIds.of(self.config).count)

    def value(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        return rows.of_noisy_stream(values["score_entropy"])

    def elbo_weight(self, timesteps: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return NoiseProcess.bound_weight(self.process, timesteps, inputs, targets)

    @classmethod
    def problems(cls, config: Config, process: NoiseProcess) -> Iterator[Problem]:
        if config.diffusion.objective not in ("diffusion", "uniform"):
            valid = f"another loss, such as {process.bound}: scores of masks that tokens can turn into are not trained ({process.name})"
            yield Problem("diffusion.loss", "score_entropy", valid, f"diffusion.loss={process.bound}")
        yield from _end_problems(config, process)
        if not config.diffusion.exclude_mask_logit:
            valid = "true with diffusion.loss=score_entropy: the mask token has no score, and samplers never write it"
            yield Problem("diffusion.exclude_mask_logit", "false", valid, "diffusion.exclude_mask_logit=true")
        num_ids, vocab_size = config.diffusion.num_noise_ids, config.model.vocab_size
        if config.diffusion.objective == "diffusion" and not 0 < num_ids <= vocab_size:
            valid = f"model.vocab_size ({vocab_size}) or less: the number of ids of the text, by which diffusion.loss=score_entropy scales"
            yield Problem("diffusion.num_noise_ids", show(num_ids), valid, f"diffusion.num_noise_ids={vocab_size}")


def _end_problems(config: Config, process: NoiseProcess) -> Iterator[Problem]:
    """Report a last t at which no token of the text is left: scores have no scale and the bound no weight there. (Of uniform noise in
    continuous time, the rules of the process report it.)"""
    diffusion = config.diffusion
    last = 1.0 if diffusion.num_timesteps > 0 else diffusion.t_max
    if process.alpha(torch.tensor([last])).item() > 0:
        return
    if diffusion.num_timesteps > 0:
        valid = "0, because the last step is at t = 1, where no token is left that scores could tell from noise"
        yield Problem("diffusion.num_timesteps", show(diffusion.num_timesteps), valid, "diffusion.num_timesteps=0")
    elif process.bound == "cross_entropy":
        valid = "a number below 1, because at t = 1 no token is left, and the scale of the scores has no logarithm"
        yield Problem("diffusion.t_max", show(diffusion.t_max), valid, "diffusion.t_max=0.9999, or diffusion.noise_schedule=log_linear")
