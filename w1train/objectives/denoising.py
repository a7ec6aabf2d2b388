"""The main term of every objective: the weighted cross-entropies of the noised tokens, and the ELBO of the process beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from w1train.diffusion.process import NoiseProcess
from w1train.model.row_terms import CrossEntropy, RowTerm
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.named_sums import Layout


@dataclass(frozen=True, slots=True)
class Denoising:
    """The sum of weight * -log p(token) over the noised tokens (LLaDA, arXiv 2502.09992, eq. 3)."""

    process: NoiseProcess
    num_t_bins: int
    """Intervals of equal length of t, for the loss by t."""

    @property
    def layout(self) -> Layout:
        by_t = (self.num_t_bins,)
        return {
            **dict.fromkeys(("weighted", "elbo", "cross_entropy", "num_masked", "num_tokens"), ()),
            **dict.fromkeys(("cross_entropy_by_t", "num_masked_by_t"), by_t),
        }

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        return {"cross_entropy": CrossEntropy(rows.targets)}

    def loss(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        return (rows.of_noisy_stream(values["cross_entropy"]) * rows.weights).sum()

    def sums(self, values: Mapping[str, Tensor], rows: LossRows) -> dict[str, Tensor]:
        # Double: float32 sums of 10^6 terms would make the logged loss depend on the order of the ranks.
        cross_entropy = rows.of_noisy_stream(values["cross_entropy"]).double()
        # bincount would ask a GPU for the largest bin.
        bins = (rows.timesteps * self.num_t_bins).long().clamp(0, self.num_t_bins - 1)
        zeros = cross_entropy.new_zeros(self.num_t_bins)
        return {
            "weighted": (cross_entropy * rows.weights.double()).sum(),
            "elbo": (cross_entropy * self.process.elbo_weight(rows.timesteps.double())).sum(),
            "cross_entropy": cross_entropy.sum(),
            "num_masked": rows.num_masked,
            "num_tokens": rows.num_tokens,
            "cross_entropy_by_t": zeros.index_add(0, bins, cross_entropy),
            "num_masked_by_t": zeros.index_add(0, bins, torch.ones_like(cross_entropy)),
        }

    def total(self, sums: Mapping[str, Any]) -> float:
        return sums["weighted"]

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        by_t = zip(sums["cross_entropy_by_t"], sums["num_masked_by_t"], strict=True)
        return {
            "elbo": sums["elbo"] / max(sums["num_tokens"], 1.0),
            "masked_cross_entropy": sums["cross_entropy"] / max(sums["num_masked"], 1.0),
            "mask_ratio": sums["num_masked"] / max(sums["num_tokens"], 1.0),
            "loss_by_t": [total / count if count else None for total, count in by_t],
        }
