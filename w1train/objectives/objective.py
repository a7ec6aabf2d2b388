"""The objective that is trained, and the sums that are logged of it, from named options: terms, the weight of each token and the
normaliser.

Every quantity is (sum of a numerator) / (sum of a denominator) over the global batch: over micro-batches, data- and context-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from w1train.config.schema import Config, DiffusionConfig
from w1train.data.documents import sums_of_documents
from w1train.diffusion.corruption import NoisyBatch, counts_units
from w1train.diffusion.processes import noise_process
from w1train.model.row_terms import RowTerm
from w1train.objectives.confidence import confidence_of
from w1train.objectives.denoising import Denoising
from w1train.objectives.every_token import EveryToken, adds_every_token
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.losses import bound_of, loss_of
from w1train.objectives.named_sums import Layout, NamedSums, scalars_first
from w1train.objectives.next_tokens import NextTokens
from w1train.objectives.preference import Preference
from w1train.objectives.term import Term
from w1train.objectives.unit_count import UnitCount
from w1train.objectives.weights import WEIGHTS, Weight, elbo_weight, trained_weights

NORMALIZERS = {
    **{"tokens": "num_tokens", "masked_tokens": "num_masked"},
    **dict.fromkeys(("samples", "documents", "sum_per_sample", "positions"), "num_units"),
}
"""The sum that the loss is divided by, for each value of diffusion.normalizer."""

TERMS: tuple[Callable[[DiffusionConfig, int], Term | None], ...] = (
    lambda config, num_t_bins: Denoising(loss_of(config), bound_of(config), num_t_bins, is_trained=not config.preference_draws),
    # The term is also there with weight 0. Without it the vector of sums would be shorter, a ring of ranks would add its numbers in another
    # order, and last bits of logged losses would change.
    lambda config, num_t_bins: NextTokens(config.autoregressive_weight),
    # Only where the loss needs them, for the same reason.
    lambda config, num_t_bins: EveryToken(config.cross_entropy_weight) if adds_every_token(config) else None,
    lambda config, num_t_bins: UnitCount() if counts_units(config) else None,
    lambda config, num_t_bins: confidence_of(config, NORMALIZERS[config.normalizer]),
)
"""The terms, each made from (diffusion, intervals of t); the result is None if the configuration does not ask for the term."""

_PARTS: dict[str, Callable[[NoisyBatch], Tensor]] = {
    "num_tokens": lambda noisy: noisy.has_target.sum(dim=1),
    "num_masked": lambda noisy: (noisy.loss_mask & noisy.target_is_noised).sum(dim=1),
    "num_units": lambda noisy: _units(noisy).sum(dim=1),
}
"""Each sample's part of these sums, [b]."""


def _units(noisy: NoisyBatch) -> Tensor:
    assert noisy.units is not None
    return noisy.units


@dataclass(frozen=True, slots=True)
class Objective:
    """The terms of a loss, how it weighs the tokens, and what it is divided by."""

    config: DiffusionConfig
    terms: tuple[Term, ...]
    weight: Weight
    normalizer: str
    """The name of a sum."""

    @property
    def layout(self) -> Layout:
        """Names and shapes of all sums."""
        return scalars_first({name: shape for term in self.terms for name, shape in term.layout.items()})

    @property
    def is_measured(self) -> bool:
        """Tell whether a term needs a pass without gradients before the pass with gradients."""
        return any(term.is_measured for term in self.terms)

    def weights(self, noisy: NoisyBatch) -> Tensor:
        """Return the weight of each output's loss, float32 [b, l], of whole samples."""
        weights = trained_weights(self.config, self.weight, noisy, loss_of(self.config))
        if self.config.normalizer == "samples":
            # 1 / (t L) with the sample's own L (LLaDA, arXiv 2502.09992, algorithm 1).
            return weights / noisy.has_target.sum(dim=1, keepdim=True).clamp_min(1)
        if self.config.normalizer == "documents":
            return weights / sums_of_documents(noisy.has_target, noisy.document_ids).clamp_min(1)
        return weights

    def denominators(self, noisy: NoisyBatch) -> Tensor:
        """Return each sample's part of what the loss is divided by, float32 [b], of whole samples."""
        return _PARTS[self.normalizer](noisy).float()

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        """Return what the terms ask of the rows of logits, by name, and each row term once."""
        asked: dict[str, RowTerm] = {}
        for term in self.terms:
            for name, row_term in term.row_terms(rows).items():
                earlier = asked.setdefault(name, row_term)
                assert earlier.is_same(row_term), f"two row terms have the name {name}"
        return asked

    def loss(self, values: Mapping[str, Tensor], rows: LossRows) -> tuple[Tensor, NamedSums]:
        """Return the weighted sum over a micro-batch, which is not divided yet and will be differentiated, and the sums to log.

        Args:
            values: the values of ``row_terms`` of all rows, by name, float32.
        """
        first, *others = [loss for term in self.terms if (loss := term.loss(values, rows)) is not None]
        with torch.no_grad():
            detached = {name: value.detach() for name, value in values.items()}
            sums = {name: value for term in self.terms for name, value in term.sums(detached, rows).items()}
            packed = NamedSums.pack(sums, self.layout)
        return sum(others, start=first), packed

    def metrics(self, sums: NamedSums) -> dict[str, Any]:
        """Return the metrics of a global batch, from sums that were already added over micro-batches and ranks."""
        numbers = sums.numbers()
        metrics: dict[str, Any] = {"loss": sum(term.total(numbers) for term in self.terms) / max(numbers[self.normalizer], 1.0)}
        for term in self.terms:
            metrics |= term.metrics(numbers)
        return metrics


def _normalizer(config: DiffusionConfig) -> str:
    """Return the value of diffusion.normalizer. The loss of preferences is a mean over pairs, and so over samples."""
    return "sum_per_sample" if config.preference_draws else config.normalizer


def objective_at(config: Config) -> Objective:
    """Return the objective of a stage of a run."""
    num_draws = config.diffusion.preference_draws
    num_texts = config.training.global_batch_size // num_draws if num_draws else 0
    return objective_of(config.diffusion, config.logging.num_t_bins, num_texts)


def objective_of(config: DiffusionConfig, num_t_bins: int, num_texts: int = 0) -> Objective:
    """Return the objective that a configuration asks for.

    Args:
        num_t_bins: intervals of t for the loss by t.
        num_texts: the texts of the global batch, of which preferences have a sum each.
    """
    terms = tuple(term for make in TERMS if (term := make(config, num_t_bins)) is not None)
    if config.preference_draws:
        terms += (Preference(config.preference_draws, config.preference_beta, config.preference_cross_entropy_weight, num_texts),)
    # Without noise there is no t on which a weight could depend.
    weight = elbo_weight if noise_process(config).is_causal else WEIGHTS[config.weight]
    return Objective(config, terms, weight, NORMALIZERS[_normalizer(config)])
