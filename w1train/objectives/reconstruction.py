"""The cross-entropy of the token given the whole noisy text, from a prediction that leaves out the position itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from w1train.diffusion.prediction import evidence
from w1train.model.row_terms import CrossEntropy, Reconstruction, RowTerm
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.row_loss import RowLoss, timesteps_and_inputs


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
        """Return 1: at each t the number bounds the likelihood of the text given the noisy text."""
        return torch.ones_like(timesteps)
