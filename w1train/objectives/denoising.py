"""The main term of every objective: the weighted losses of the rows of the noisy stream, and the ELBO of the process beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from w1train.model.row_terms import CrossEntropy, RowTerm
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.named_sums import Layout
from w1train.objectives.row_loss import RowLoss

KINDS = ("clean", "wrong", "mask")
"""The kinds of tokens that the model sees where noise can be any token: the token of the text, another token, and the mask token."""


@dataclass(frozen=True, slots=True)
class Denoising:
    """The sum of weight * loss over the rows of the noisy stream."""

    loss_of_rows: RowLoss
    bound: RowLoss
    num_t_bins: int
    """Intervals of equal length of t, for the loss by t."""
    is_trained: bool = True
    """False: another term is trained, and this term only says how well the model denoises."""

    is_measured: ClassVar[bool] = False

    @property
    def layout(self) -> Layout:
        by_t = (self.num_t_bins,)
        names = ("weighted", "elbo", "cross_entropy", "num_masked", "num_tokens")
        return {
            **dict.fromkeys(names, ()),
            **dict.fromkeys(("cross_entropy_by_t", "num_masked_by_t"), by_t),
            **dict.fromkeys(self._kinds(), ()),
        }

    def _kinds(self) -> tuple[str, ...]:
        return tuple(f"elbo_{kind}" for kind in KINDS) if self.bound.process.predicts_every_token else ()

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        return {**self.bound.row_terms(rows), **self.loss_of_rows.row_terms(rows), "cross_entropy": CrossEntropy(rows.targets)}

    def loss(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor | None:
        return self.loss_of_rows.total(values, rows) if self.is_trained else None

    def sums(self, values: Mapping[str, Tensor], rows: LossRows) -> dict[str, Tensor]:
        # Double: float32 sums of 10^6 terms would make the logged loss depend on the order of the ranks.
        wide = {name: value.double() for name, value in values.items()}
        is_noised = rows.is_noised.double()
        cross_entropy = rows.of_noisy_stream(wide["cross_entropy"]) * is_noised
        # bincount would ask a GPU for the largest bin.
        bins = (rows.timesteps * self.num_t_bins).long().clamp(0, self.num_t_bins - 1)
        zeros = cross_entropy.new_zeros(self.num_t_bins)
        densities = self._densities(wide, rows)
        return {
            "weighted": (self.loss_of_rows.value(wide, rows) * rows.weights.double()).sum() + self.loss_of_rows.end_terms(rows),
            "elbo": densities.sum() + self.bound.end_terms(rows),
            "cross_entropy": cross_entropy.sum(),
            "num_masked": rows.num_masked,
            "num_tokens": rows.num_tokens,
            "cross_entropy_by_t": zeros.index_add(0, bins, cross_entropy),
            "num_masked_by_t": zeros.index_add(0, bins, is_noised),
            **dict(zip(self._kinds(), self._by_kind(densities, rows), strict=False)),
        }

    def _densities(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        """Return what each row adds to the negative ELBO, float64 [m]. If noise is on the mask token alone, tokens that noise has kept add
        nothing, and are rows only where they are trained."""
        weights = self.bound.elbo_weight(rows.timesteps.double(), rows.inputs, rows.of_noisy_stream(rows.targets))
        densities = self.bound.value(values, rows) * weights
        return densities if self.bound.process.predicts_every_token else torch.where(rows.is_noised, densities, 0.0)

    def _by_kind(self, densities: Tensor, rows: LossRows) -> tuple[Tensor, ...]:
        """Return the sum of densities of each of KINDS."""
        is_clean, is_mask = rows.inputs == rows.of_noisy_stream(rows.targets), rows.inputs == self.bound.config.mask_token_id
        return tuple((densities * kind).sum() for kind in (is_clean & ~is_mask, ~is_clean & ~is_mask, is_mask))

    def total(self, sums: Mapping[str, Any]) -> float:
        return sums["weighted"] if self.is_trained else 0.0

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        by_t = zip(sums["cross_entropy_by_t"], sums["num_masked_by_t"], strict=True)
        num_tokens = max(sums["num_tokens"], 1.0)
        return {
            "elbo": sums["elbo"] / num_tokens,
            "masked_cross_entropy": sums["cross_entropy"] / max(sums["num_masked"], 1.0),
            "mask_ratio": sums["num_masked"] / num_tokens,
            "loss_by_t": [total / count if count else None for total, count in by_t],
            **{name: sums[name] / num_tokens for name in self._kinds()},
        }
