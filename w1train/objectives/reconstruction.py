"""The cross-entropy of the token given the whole noisy text, from a prediction that leaves out the position itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from w1train.config.errors import Problem
from w1train.config.schema import Config
from w1train.diffusion.prediction import evidence
from w1train.diffusion.process import NoiseProcess
from w1train.model.row_terms import CrossEntropy, Reconstruction, RowTerm
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.row_loss import ELBO_WEIGHTS, RowLoss, timesteps_and_inputs


class ReconstructionLoss(RowLoss):
    """-log p(x | z), where p(x | z) is the normalised product of q_t(z | x) and the prediction. At the smallest t it is the end term of the
    bound, -log p(x | z_0)."""

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        if self.config.prediction == "full":
            return {"reconstruction": CrossEntropy(rows.targets)}
        timesteps, inputs = timesteps_and_inputs(rows)
        return {"reconstruction": Reconstruction(rows.targets, inputs, evidence(self.process, timesteps, inputs))}

    def value(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        return rows.of_noisy_stream(values["reconstruction"])

    def elbo_weight(self, timesteps: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return 1: at each t the number is a part of a bound, but the mean over t is no bound."""
        return torch.ones_like(timesteps)

    @classmethod
    def problems(cls, config: Config, process: NoiseProcess) -> Iterator[Problem]:
        if (weight := config.diffusion.weight) in ELBO_WEIGHTS:
            valid = "constant or another weight, because diffusion.loss=reconstruction is not the bound, whatever its weight is"
            yield Problem("diffusion.weight", weight, valid, "diffusion.weight=constant")
