"""The bound of masks whose rate depends on the token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from w1train.config.errors import Problem
from w1train.config.schema import Config
from w1train.diffusion.per_id_masked import PerIdMaskedProcess
from w1train.diffusion.process import NoiseProcess
from w1train.model.row_terms import RowTerm, WeightedCrossEntropy
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.row_loss import Prediction, RowLoss, for_all_rows


class PerIdLoss(RowLoss):
    """lambda_x (-log p(x) - 1) + the mean of lambda over the prediction at masked tokens, where lambda_v = -alpha'_v / (1 - alpha_v) is
    the rate of the id v at t (MD4, arXiv 2406.04329, section 6; DiffusionBERT, arXiv 2211.15029, trains it in discrete time)."""

    positions: ClassVar[Literal["noised", "all"]] = "noised"

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        assert isinstance(self.process, PerIdMaskedProcess)
        timesteps = for_all_rows(rows, rows.timesteps, 0.5)
        table = self.process.table_on(rows.targets.device).float()
        return {"per_id": WeightedCrossEntropy(rows.targets, table, timesteps, self.process.spindle)}

    def value(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        return rows.of_noisy_stream(values["per_id"])

    def elbo_weight(self, timesteps: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return 1: the rates are in the value."""
        return torch.ones_like(timesteps)

    @classmethod
    def taught(cls, config: Config) -> Prediction | None:
        return None

    @classmethod
    def problems(cls, config: Config, process: NoiseProcess) -> Iterator[Problem]:
        if process.bound != "per_id":
            valid = f"{process.bound}, which is the bound of {process.name}"
            yield Problem("diffusion.loss", "per_id", valid, f"diffusion.loss={process.bound}")
