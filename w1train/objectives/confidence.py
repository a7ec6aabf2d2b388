"""The entropy of correct predictions, which confidence-aware training lowers beside a cross-entropy (certainty forcing of dParallel, arXiv
2509.26488; the confidence-aware training of LLaDA2.0, arXiv 2512.15745).

A model that is sure of more tokens at once decides more tokens in each step of the sampler. The cross-entropy alone stops to sharpen the
distribution of a token soon after the token is the most probable id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.diffusion.processes import noise_process
from w1train.model.row_terms import Entropy, IsMostProbable, RowTerm
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.named_sums import Layout


@dataclass(frozen=True, slots=True)
class Confidence:
    """weight * the mean entropy, at a temperature, of the noised tokens whose most probable id is the target; 0 if there is no such token.

    The mean is taken over the global batch, whose number of such tokens comes from the pass without gradients. The engine divides the sum
    of all terms by the objective's normaliser, so the term is multiplied by the normaliser.
    """

    weight: float
    temperature: float
    normalizer: str
    """The name of the sum that the objective is divided by."""

    is_measured: ClassVar[bool] = True

    @property
    def layout(self) -> Layout:
        return {"entropy_of_correct": (), "num_correct": ()}

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        asked: dict[str, RowTerm] = {"is_most_probable": IsMostProbable(rows.targets)}
        # A pass without gradients only counts.
        return asked if rows.measured is None else {**asked, "entropy": Entropy(self.temperature)}

    def loss(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor | None:
        if rows.measured is None:
            assert not torch.is_grad_enabled(), "a pass with gradients needs the sums of the pass before it"
            return None
        factor = self.weight * rows.measured[self.normalizer] / rows.measured["num_correct"].clamp_min(1)
        entropies = rows.of_noisy_stream(values["entropy"])
        return factor.to(entropies.dtype) * (entropies * _is_correct(values, rows)).sum()

    def sums(self, values: Mapping[str, Tensor], rows: LossRows) -> dict[str, Tensor]:
        is_correct = _is_correct(values, rows).double()
        entropies = torch.zeros_like(is_correct) if rows.measured is None else rows.of_noisy_stream(values["entropy"]).double()
        return {"entropy_of_correct": (entropies * is_correct).sum(), "num_correct": is_correct.sum()}

    def total(self, sums: Mapping[str, Any]) -> float:
        return self.weight * sums[self.normalizer] * self._mean(sums)

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        return {"masked_accuracy": sums["num_correct"] / max(sums["num_masked"], 1.0), "entropy_of_correct": self._mean(sums)}

    def _mean(self, sums: Mapping[str, Any]) -> float:
        """Return the mean entropy of correct predictions in nats."""
        return sums["entropy_of_correct"] / max(sums["num_correct"], 1.0)


def confidence_of(config: DiffusionConfig, normalizer: str) -> Confidence | None:
    """Return the term of a configuration, whose objective is divided by the sum ``normalizer``; None if it has no such term. In
    autoregression no token is noised."""
    if config.confidence_weight == 0 or noise_process(config).is_causal:
        return None
    return Confidence(config.confidence_weight, config.confidence_temperature, normalizer)


def _is_correct(values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
    """Return 1 at noised tokens that are predicted correctly, otherwise 0, [m]. It has no gradient."""
    return rows.of_noisy_stream(values["is_most_probable"]).detach() * rows.is_noised
