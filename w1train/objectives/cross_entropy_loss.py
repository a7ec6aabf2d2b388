"""The cross-entropy of each token, and the changes of it that are published: label smoothing and the focal factor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from w1train.config.errors import Problem
from w1train.config.schema import Config
from w1train.diffusion.process import NoiseProcess
from w1train.model.row_terms import CrossEntropy, MeanLogProbability, RowTerm
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.row_loss import ELBO_WEIGHTS, Prediction, RowLoss


class PlainCrossEntropy(RowLoss):
    """-log p(token) (LLaDA, arXiv 2502.09992, eq. 3), which bounds the likelihood if all noise is on the mask token."""

    positions: ClassVar[Literal["noised", "all"]] = "noised"

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        return {"cross_entropy": CrossEntropy(rows.targets)}

    def value(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        return rows.of_noisy_stream(values["cross_entropy"])

    def elbo_weight(self, timesteps: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.process.elbo_weight(timesteps)

    @classmethod
    def taught(cls, config: Config) -> Prediction | None:
        """Return what is learned of noised ordinary tokens. A token that noise has drawn says nothing about the text, so the cross-entropy
        of noised tokens alone teaches leave_one_out. Where kept tokens are among them, the token at the position counts (full). Changed
        tokens teach either of the two without the noised token itself."""
        return {"all": "full", "changed": None}.get(config.diffusion.loss_positions, "leave_one_out")

    @classmethod
    def problems(cls, config: Config, process: NoiseProcess) -> Iterator[Problem]:
        weight = config.diffusion.weight
        if weight in ELBO_WEIGHTS and process.bound != "cross_entropy":
            valid = f"constant, one_minus_t or log_snr: the cross-entropy is no bound of the likelihood in {process.name}"
            yield Problem("diffusion.weight", weight, valid, f"diffusion.loss={process.bound}, which is the bound")


class TrainedCrossEntropy(PlainCrossEntropy):
    """The cross-entropy with label smoothing (the target is spread over all ids, as in RDM, arXiv 2302.05737), times the focal factor
    (1 - p)^gamma (arXiv 1708.02002, eq. 4)."""

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        smooth = {"mean_log_probability": MeanLogProbability()} if self.config.label_smoothing > 0 else {}
        return {**super().row_terms(rows), **smooth}

    def value(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        cross_entropy = loss = super().value(values, rows)
        if (share := self.config.label_smoothing) > 0:
            loss = (1 - share) * loss - share * rows.of_noisy_stream(values["mean_log_probability"])
        if (gamma := self.config.focal_gamma) > 0:
            # Without a bound the derivative of a root would be infinite where p is 1.
            loss = loss * (-torch.expm1(-cross_entropy)).clamp_min(1e-30) ** gamma
        return loss
