"""The bound of a process in T steps of discrete time (D3PM, arXiv 2107.03006)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from w1train.config.errors import Problem
from w1train.config.schema import Config
from w1train.diffusion.process import NoiseProcess
from w1train.model.row_terms import FiniteKl, RowTerm
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.row_loss import RowLoss, timesteps_and_inputs


class FiniteKlLoss(RowLoss):
    """KL(q(z_s | z_t, x) || p(z_s | z_t)) of the step from t to s = t - 1/T (D3PM, arXiv 2107.03006, eq. 1). In the first step s is 0, and
    the number is the cross-entropy of the token given the whole noisy text."""

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        timesteps, inputs = timesteps_and_inputs(rows)
        num = self.config.num_timesteps
        # float32 has rounded t, and a step of the grid must not become two.
        steps = (timesteps * num).round()
        now, before = steps / num, (steps - 1) / num
        return {"finite_kl": FiniteKl(rows.targets, inputs, **self._noise(now, before, inputs))}

    def _noise(self, now: Tensor, before: Tensor, inputs: Tensor) -> dict[str, Any]:
        process, mask = self.process, self.config.mask_token_id
        has_mask = not self.config.exclude_mask_logit
        return {
            "alpha": process.alpha(now),
            "input_noise": process.noise(now, inputs),
            "earlier_alpha": process.alpha(before),
            "earlier_word_noise": process.word_noise(before),
            "earlier_input_noise": process.noise(before, inputs),
            "mask_token_id": mask if has_mask else None,
            "earlier_mask_noise": process.noise(before, torch.full_like(inputs, mask)) if has_mask else None,
        }

    def value(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        return rows.of_noisy_stream(values["finite_kl"])

    def elbo_weight(self, timesteps: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return T: the bound is the sum over the steps, and a draw of t is one step of T."""
        return torch.full_like(timesteps, self.config.num_timesteps)

    @classmethod
    def problems(cls, config: Config, process: NoiseProcess) -> Iterator[Problem]:
        if config.diffusion.num_timesteps == 0:
            yield Problem("diffusion.num_timesteps", "0", "a number of steps, because diffusion.loss is finite_kl", "1000 (D3PM)")
        num_steps, num_points = config.diffusion.num_timesteps, len(config.validation.timesteps)
        if 0 < num_steps < num_points and num_points % num_steps:
            valid = f"a multiple of diffusion.num_timesteps ({num_steps}), or fewer, so that validation counts every step alike"
            yield Problem("validation.timesteps", f"{num_points} timesteps", valid)
        if process.bound == "per_id":
            valid = f"per_id: the noising probability of {process.name} depends on the token"
            yield Problem("diffusion.loss", "finite_kl", valid, "diffusion.loss=per_id")
