"""Preferences between two replies to the same prompt: DPO on differences of ELBOs (VRPO, LLaDA 1.5, arXiv 2505.19223).

The estimate of the ELBO of a reply y is B(y) = -(1/n) sum over n draws of noise, and over the noised tokens of each draw, of the bound's
weight times the cross-entropy. It is not divided by the length of the reply. With the margin

    s = beta [(B - B_ref)(chosen) - (B - B_ref)(rejected)]

the loss of a pair is -log sigmoid(s), and the loss of a step is the mean over the pairs of the global batch. No micro-batch knows s before
the last draw of the pair has been computed. A pass without gradients therefore computes B of the model and of the reference first, and the
pass with gradients sums cross-entropies that are multiplied by the derivative of the loss: dL / dB(chosen) = -beta sigmoid(-s), and the
opposite for the rejected reply. This is the exact gradient for any micro-batch size and in any layout.

Shapes: T = texts of the global batch (text 2p is the chosen reply of pair p, and text 2p + 1 the rejected reply), m = rows of the noisy
stream, b = samples of a micro-batch. Sample i of the global batch is a draw of text i // n.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from w1train.model.row_terms import CrossEntropy, RowTerm
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.named_sums import Layout

PAIR_METRICS = (
    *("preference_loss", "preference_margin", "preference_accuracy"),
    *("elbo_chosen", "elbo_chosen_change", "elbo_rejected", "elbo_rejected_change"),
)
"""The names of ``preference_metrics``."""


@dataclass(frozen=True, slots=True)
class PairScores:
    """Margins and losses of pairs of texts, float64 [pairs] each."""

    margins: Tensor
    """s, which is positive where the model prefers the chosen reply more than the reference does."""
    loss: Tensor
    """-log sigmoid(s)."""

    @classmethod
    def of(cls, bounds: Tensor, reference: Tensor, beta: float) -> PairScores:
        """Return the scores of pairs.

        Args:
            bounds: float64 [T], -B of each text in nats.
            reference: float64 [T], -B_ref of each text.
        """
        chosen, rejected = (reference - bounds).view(-1, 2).unbind(dim=1)
        margins = beta * (chosen - rejected)
        return cls(margins, softplus(-margins))

    @property
    def accuracy(self) -> Tensor:
        """The share of pairs that the model orders right. A margin of exactly 0, as before the first step, counts as half right."""
        return ((self.margins > 0).double() + 0.5 * (self.margins == 0).double()).mean()


@dataclass(frozen=True, slots=True)
class Preference:
    """The loss of pairs of replies, times the number of samples of a pair, because the sum is divided by the number of samples."""

    num_draws: int
    """n."""
    beta: float
    cross_entropy_weight: float
    """The factor of the chosen reply's negative ELBO per token, which is added to the loss of its pair."""
    num_texts: int
    """T."""

    is_measured: ClassVar[bool] = True

    @property
    def layout(self) -> Layout:
        return dict.fromkeys(("text_bounds", "reference_bounds", "text_tokens"), (self.num_texts,))

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        return {"cross_entropy": CrossEntropy(rows.targets)}

    def loss(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        losses = rows.of_noisy_stream(values["cross_entropy"]) * rows.weights
        if rows.measured is None:
            return losses.sum()
        return (losses * self.factors(rows.measured)[self._texts_of_rows(rows)].float()).sum()

    def factors(self, measured: Mapping[str, Tensor]) -> Tensor:
        """Return what the weighted cross-entropies of each text are multiplied by, float64 [T]: 2n times the derivative of the pair's loss
        by the sum of these cross-entropies over the draws of the text."""
        bounds, reference = (measured[name] / self.num_draws for name in ("text_bounds", "reference_text_bounds"))
        slopes = 2 * self.beta * torch.sigmoid(-PairScores.of(bounds, reference, self.beta).margins)
        lengths = (measured["text_tokens"] / self.num_draws).clamp_min(1)[0::2]
        return torch.stack([slopes + 2 * self.cross_entropy_weight / lengths, -slopes], dim=1).flatten()

    def sums(self, values: Mapping[str, Tensor], rows: LossRows) -> dict[str, Tensor]:
        assert rows.samples is not None
        losses = rows.of_noisy_stream(values["cross_entropy"]).double() * rows.weights.double()
        zeros = losses.new_zeros(self.num_texts)
        # A sample of padding has no place in the batch, and adds zeros.
        texts = (rows.samples.places // self.num_draws).clamp_min(0)
        reference = torch.zeros_like(zeros) if rows.measured is None else rows.measured["reference_text_bounds"]
        shares = reference[texts] / self.num_draws * rows.samples.is_counted
        return {
            "text_bounds": zeros.index_add(0, self._texts_of_rows(rows), losses),
            "reference_bounds": zeros.index_add(0, texts, shares),
            "text_tokens": zeros.index_add(0, texts, rows.samples.num_tokens.double()),
        }

    def _texts_of_rows(self, rows: LossRows) -> Tensor:
        assert rows.samples is not None
        return rows.samples.places_of_rows // self.num_draws

    def total(self, sums: Mapping[str, Any]) -> float:
        texts = TextScores.of(sums, self.num_draws)
        loss = PairScores.of(texts.bounds, texts.reference, self.beta).loss + self.cross_entropy_weight * texts.per_token[0::2]
        return 2 * self.num_draws * float(loss.sum())

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        return preference_metrics(TextScores.of(sums, self.num_draws), self.beta)


@dataclass(frozen=True, slots=True)
class TextScores:
    """The estimates of both models for each text, float64 [T] each."""

    bounds: Tensor
    """-B in nats."""
    reference: Tensor
    """-B_ref in nats."""
    num_tokens: Tensor
    """Tokens of the reply."""

    @classmethod
    def of(cls, sums: Mapping[str, Any], num_draws: int) -> TextScores:
        """Return the scores that the sums of ``Preference.layout`` over all draws give."""
        names = ("text_bounds", "reference_bounds", "text_tokens")
        return cls(*(torch.as_tensor(sums[name], dtype=torch.float64) / num_draws for name in names))

    @property
    def per_token(self) -> Tensor:
        """-B in nats per token."""
        return self.bounds / self.num_tokens.clamp_min(1)


def preference_metrics(texts: TextScores, beta: float) -> dict[str, float]:
    """Return the metrics of pairs by their names in records. The ELBOs of both sides are in nats per token, as the metric elbo is, and
    their changes are those of the model minus those of the reference: below 0 where the model finds the replies more likely."""
    pairs = PairScores.of(texts.bounds, texts.reference, beta)
    metrics = {
        "preference_loss": float(pairs.loss.mean()),
        "preference_margin": float(pairs.margins.mean()),
        "preference_accuracy": float(pairs.accuracy),
    }
    for first, side in enumerate(("chosen", "rejected")):
        bounds, reference, num_tokens = (part[first::2].sum() for part in (texts.bounds, texts.reference, texts.num_tokens))
        metrics[f"elbo_{side}"] = float(bounds / num_tokens)
        metrics[f"elbo_{side}_change"] = float((bounds - reference) / num_tokens)
    return metrics
