"""Row terms with random values, and the definition of each, from all logits of a row, for autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from w1train.model.row_terms import (
    CrossEntropy,
    Entropy,
    FiniteKl,
    KlIs,
    LogProbabilities,
    MeanLogProbability,
    Reconstruction,
    RowTerm,
    ScoreEntropy,
    WeightedCrossEntropy,
)

OF_SOFTMAX = ("cross-entropy", "log-probabilities", "entropy")
IN_TRITON = (*OF_SOFTMAX, "kl-is", "kl-is of the full posterior", "finite-kl with a mask")
TERMS = (*IN_TRITON, "finite-kl", "reconstruction", "score entropy", "weighted", "mean log-probability", "entropy at a half")


@dataclass(frozen=True)
class Noise:
    """Hybrid noise at t, of which 0.7 is on the mask if there is one, and the rest is shared by the other ids."""

    timesteps: Tensor
    num_words: int
    has_mask: bool

    @property
    def alpha(self) -> Tensor:
        return 1 - self.timesteps

    @property
    def word(self) -> Tensor:
        return self.timesteps * (0.3 if self.has_mask else 1.0) / self.num_words

    @property
    def mask(self) -> Tensor:
        return self.timesteps * (0.7 if self.has_mask else 0.0)

    def at(self, is_mask: Tensor) -> Tensor:
        return torch.where(is_mask, self.mask, self.word)


def make_term(name: str, num_rows: int, vocabulary: int, excluded: int | None) -> RowTerm:
    """A term whose ids are spread over the vocabulary. No target is excluded; two of the five ids of a row are the same; z is clean, wrong
    or the mask, which is the excluded token or, for one term, an id of the softmax."""
    taken = [-1 if excluded is None else excluded]
    mask = taken[0]
    if name == "finite-kl with a mask":
        mask = vocabulary - 2
        taken.append(mask)
    ids = (torch.arange(num_rows)[:, None] * 7 + torch.tensor([1, 12, 23, 1, 44])) % vocabulary
    while (clash := torch.isin(ids, torch.tensor(taken))).any():
        ids = torch.where(clash, (ids + 1) % vocabulary, ids)
    has_mask = mask >= 0
    kinds = torch.arange(num_rows) % 3
    inputs = torch.where(kinds == 0, ids[:, 0], torch.where((kinds == 1) | (not has_mask), ids[:, 1], mask))
    num_words = vocabulary - len({token for token in taken if token >= 0})
    # Numbers that fp32 has exactly.
    now = Noise(torch.arange(1, num_rows + 1).double() / 2 ** max(4, num_rows.bit_length()), num_words, has_mask)
    if name in {"log-probabilities", "cross-entropy", "entropy", "entropy at a half", "mean log-probability"}:
        return _of_softmax(name, ids)
    if name == "weighted":
        table = (torch.arange(vocabulary) % 8 / 8 + 0.5).requires_grad_()
        return WeightedCrossEntropy(ids[:, 0], table, now.timesteps, _rates)
    return _of_noise(name, ids[:, 0], inputs, now, mask)


def _rates(table: Tensor, timesteps: Tensor) -> Tensor:
    return table * (2 - timesteps)


def _of_softmax(name: str, ids: Tensor) -> RowTerm:
    match name:
        case "entropy":
            return Entropy()
        case "entropy at a half":
            return Entropy(temperature=0.5)
        case "mean log-probability":
            return MeanLogProbability()
        case "cross-entropy":
            return CrossEntropy(ids[:, 0])
    return LogProbabilities(ids)


def _of_noise(name: str, targets: Tensor, inputs: Tensor, now: Noise, mask: int) -> RowTerm:
    input_noise = now.at(inputs == mask)
    observed = (1 + now.alpha / input_noise).log()
    # The steps of the first three rows, one of each kind of z, end at s = 0.
    steps = torch.where(torch.arange(len(targets)) < 3, 0.0, 0.75)
    earlier = Noise(now.timesteps * steps, now.num_words, now.has_mask)
    match name:
        case "reconstruction":
            return Reconstruction(targets, inputs, observed)
        case "kl-is":
            return KlIs(targets, inputs, now.alpha, now.word, input_noise)
        case "kl-is of the full posterior":
            return KlIs(targets, inputs, now.alpha, now.word, input_noise, observed)
        case "score entropy":
            return ScoreEntropy(targets, inputs, now.alpha, now.word, input_noise, -1 - now.timesteps)
    noise = (now.alpha, input_noise, earlier.alpha, earlier.word, earlier.at(inputs == mask))
    if name == "finite-kl":
        return FiniteKl(targets, inputs, *noise)
    return FiniteKl(targets, inputs, *noise, mask, earlier.mask)


def dense_term(term: RowTerm, logits: Tensor) -> Tensor:
    """The term by its definition, from all logits [m, vocabulary], -inf at the excluded token."""
    log_probabilities = logits.log_softmax(dim=-1)
    match term:
        case CrossEntropy(targets):
            return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        case LogProbabilities(ids):
            return log_probabilities.gather(1, ids)
        case Entropy(temperature):
            log_probabilities = (logits / temperature).log_softmax(dim=-1)
            return -(log_probabilities.exp() * log_probabilities.clamp_min(-1e9)).sum(dim=-1)
        case MeanLogProbability():
            return log_probabilities[:, logits[0].isfinite()].mean(dim=-1)
        case Reconstruction(targets, inputs, observed):
            full = logits + _one_hot(inputs, logits) * observed[:, None]
            return torch.nn.functional.cross_entropy(full, targets, reduction="none")
        case WeightedCrossEntropy(targets, table, timesteps, rates):
            every = rates(table.double(), timesteps[:, None])
            of_target = every.gather(1, targets[:, None])[:, 0]
            cross_entropy = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            return of_target * (cross_entropy - 1) + (every * log_probabilities.exp()).sum(dim=-1)
        case KlIs():
            return _dense_kl_is(term, logits)
        case FiniteKl():
            return _dense_finite_kl(term, log_probabilities.exp(), logits)
        case ScoreEntropy():
            return _dense_score_entropy(term, logits)
    raise AssertionError(term)


def _one_hot(ids: Tensor, logits: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(ids, logits.shape[1]).double()


def _dense_kl_is(term: KlIs, logits: Tensor) -> Tensor:
    if term.observed is not None:
        logits = logits - _one_hot(term.inputs, logits) * term.observed[:, None]
    alpha = term.alpha[:, None]
    # What noise puts on an id that is not in the softmax is the same in both laws.
    noise = term.word_noise[:, None].expand_as(logits).scatter(1, term.inputs[:, None], term.input_noise[:, None])
    by_target, by_model = noise + alpha * _one_hot(term.targets, logits), noise + alpha * logits.softmax(dim=-1)
    divergence = (torch.xlogy(by_target, by_target) - torch.xlogy(by_target, by_model)).sum(dim=-1)
    ratio = (by_target / by_model).gather(1, term.inputs[:, None])[:, 0]
    return divergence + ratio - ratio.log() - 1


def _dense_finite_kl(term: FiniteKl, prediction: Tensor, logits: Tensor) -> Tensor:
    """The two posteriors over the whole vocabulary, and their divergence."""
    in_softmax = logits[0].isfinite()
    noise = term.earlier_word_noise[:, None].expand_as(logits)
    if term.mask_token_id is not None:
        noise = torch.where(in_softmax, noise, 0.0).index_copy(1, torch.tensor([term.mask_token_id]), term.earlier_mask_noise[:, None])
    else:
        rest = 1 - term.earlier_alpha - in_softmax.sum() * term.earlier_word_noise
        noise = torch.where(in_softmax, noise, rest[:, None])
    kept = (term.alpha / term.earlier_alpha)[:, None]
    jump = term.input_noise[:, None] - kept * term.earlier_input_noise[:, None]
    transition = kept * _one_hot(term.inputs, logits) + jump

    def posterior(clean: Tensor) -> Tensor:
        joint = (noise + term.earlier_alpha[:, None] * clean) * transition
        return joint / joint.sum(dim=-1, keepdim=True)

    by_target, by_model = posterior(_one_hot(term.targets, logits)), posterior(prediction)
    by_model = torch.where(by_target > 0, by_model, 1.0)
    return (torch.xlogy(by_target, by_target) - torch.xlogy(by_target, by_model)).sum(dim=-1)


def _dense_score_entropy(term: ScoreEntropy, logits: Tensor) -> Tensor:
    others = logits.isfinite() & (_one_hot(term.inputs, logits) == 0)
    log_scores = torch.where(others, logits + term.log_scale[:, None], 0.0)
    law = term.word_noise[:, None] + term.alpha[:, None] * _one_hot(term.targets, logits)
    of_input = term.input_noise + term.alpha * (term.inputs == term.targets)
    ratios = law / of_input[:, None]
    each = log_scores.exp() - ratios * log_scores + torch.xlogy(ratios, ratios) - ratios
    return of_input * (each * others).sum(dim=-1)


def upstream_of(names: Any, num_rows: int, generator: torch.Generator) -> list[Tensor]:
    """A random gradient of each term's value."""
    shapes = [(num_rows, 5) if name == "log-probabilities" else (num_rows,) for name in names]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
