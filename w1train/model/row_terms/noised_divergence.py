"""Divergences between the laws of a noised token, given the token and given the model's prediction: the bounds of uniform and hybrid noise.

Noise keeps a token with probability alpha and puts the probability c(v) on each id v: q(v | x) = alpha [v = x] + c(v). Given the
prediction p of the model, it is q(v | p) = alpha p(v) + c(v). All ordinary ids have one c, so that the divergence needs two sums over the
vocabulary (GIDD, arXiv 2503.04482, and D3PM, arXiv 2107.03006, have vectors of the vocabulary's size in its place).

Shapes: m = rows, k = rows of a chunk, v = vocabulary of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.kernels.noised_softmax import noised_sums, write_gradient
from w1train.model.row_terms.row_term import RowStatistics, RowTerm, Vocabulary

LARGEST_LOG_RATIO = 80.0
"""The largest logarithm of alpha / c that the kernels see, so that nothing overflows in fp32. Beyond it, and at c = 0, c times the sum of
logarithms is below the rounding of the rest."""
SMALLEST_ALPHA = 1e-300


@dataclass(slots=True, frozen=True)
class _Predictions:
    """Numbers that a divergence reads of the model's prediction p in k rows, float64."""

    log_named: Tensor
    """[n, k]: log p of the ids that the term names, the target first."""
    log_scale: Tensor
    """[k]: log of p(v) / exp(logit - largest), the same for all ids that are not removed."""

    @property
    def named(self) -> Tensor:
        return self.log_named.exp()


@dataclass(slots=True, frozen=True)
class _Mixture:
    """The law alpha p + c, in the float64 numbers [k] that belong to k rows."""

    alpha: Tensor
    noise: Tensor
    """c of one ordinary id."""

    @property
    def ratio(self) -> Tensor:
        """alpha / c inside the range of the kernels."""
        return (self.alpha.log() - self.noise.log()).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()

    def share(self, log_prediction: Tensor) -> Tensor:
        """Return alpha p / (alpha p + c)."""
        return (self.alpha.log() + log_prediction - self.noise.log()).sigmoid()

    def log_odds(self, is_target: Tensor, log_prediction: Tensor) -> Tensor:
        """Return log(q(v | x) / q(v | p)) of one id v in each row."""
        of_target = torch.where(is_target, self.alpha + self.noise, self.noise)
        return of_target.log() - torch.logaddexp(self.noise.log(), self.alpha.log() + log_prediction)

    def divergence(self, log_target: Tensor, logarithms: Tensor) -> Tensor:
        """Return KL(q(. | x) || q(. | p)) from log p(x) and the sum over all ids of log(1 + ratio p), [k].

        It is written as alpha log(q(x | x) / q(x | p)) + c (log(1 + ratio) - sum), so that it is exactly alpha times the cross-entropy
        where c is zero.
        """
        total = self.alpha + self.noise
        of_target = -torch.logaddexp((self.noise / total).log(), (self.alpha / total).log() + log_target)
        return self.alpha * of_target + self.noise * (self.ratio.log1p() - logarithms)


@dataclass(slots=True, frozen=True)
class KlIs(RowTerm):
    """KL(q(. | x) || q(. | p)) + IS(q(z | x), q(z | p)) in nats, [m], where x is the target, z the id that the model saw, and
    IS(a, b) = a/b - log(a/b) - 1 (GIDD, arXiv 2503.04482, theorem 3.1).

    Times r_t(z) / q_t(z | x), r_t(z) being the rate of jumps into z, it is the density of the negative ELBO in t. Without noise on ordinary
    ids it is alpha times the cross-entropy where z is the mask. Every id of the softmax is an ordinary id; other ids, such as the mask, are
    excluded from it.
    """

    targets: Tensor
    """int64 [m]: x, ids in the softmax."""
    inputs: Tensor
    """int64 [m]: z, any ids."""
    alpha: Tensor
    """float32 or float64 [m]: alpha_t, in [0, 1]."""
    word_noise: Tensor
    """float32 or float64 [m]: c_t of one ordinary id."""
    input_noise: Tensor
    """float32 or float64 [m]: c_t(z). Where it is zero no jump leads to z, so the weight of the row is zero, and IS counts as zero."""
    observed: Tensor | None = None
    """float32 or float64 [m]: log(1 + alpha_t / c_t(z)), finite, of a model that predicts the full posterior: it is taken off the logit of
    z, which makes p the leave-one-out posterior of the bound. None: the model predicts the leave-one-out posterior."""

    @property
    def chosen_ids(self) -> Tensor:
        return torch.stack([self.targets, self.inputs])

    @property
    def removed_ids(self) -> Tensor | None:
        return None if self.observed is None else self.inputs

    @property
    def num_sums(self) -> int:
        return 2

    def local_sums(self, logits: Tensor, part: slice, statistics: RowStatistics, vocabulary: Vocabulary) -> Tensor:
        return _local_sums(logits, self._predictions(statistics, part), self._mixture(part), statistics, vocabulary)

    def value(self, statistics: RowStatistics) -> Tensor:
        every = slice(None)
        mixture, predictions = self._mixture(every), self._predictions(statistics, every)
        logarithms, _ = self._sums(statistics, predictions, mixture)
        log_odds = _mixture(mixture.alpha, self.input_noise).log_odds(self.targets == self.inputs, predictions.log_named[1])
        of_input = torch.where(self.input_noise > 0, log_odds.expm1() - log_odds, 0.0)
        return (mixture.divergence(predictions.log_named[0], logarithms) + of_input).to(statistics.total.dtype)

    def write_gradient(self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
        mixture, predictions = self._mixture(part), self._predictions(statistics, part)
        _, shares = self._sums(statistics, predictions, mixture)
        of_input = self._input_gradient(part, mixture, predictions)
        of_target = mixture.alpha * mixture.share(predictions.log_named[0])
        base = of_target - mixture.alpha * shares - of_input
        named = torch.stack([-of_target, of_input])
        if self.observed is not None:
            # The kernel does not see the logit of z, so its part of what all ids get is added here.
            prediction = predictions.named[1]
            named[1] += prediction * (base + mixture.alpha * _share(mixture.ratio * prediction))
        columns = torch.stack([self.targets[part], self.inputs[part]]) - vocabulary.first_token
        derivative = _Gradient(base, mixture.alpha, named)
        _write_gradient(logits, columns, predictions, mixture, statistics, derivative, gradient, vocabulary)

    def _mixture(self, part: slice) -> _Mixture:
        return _mixture(self.alpha[part], self.word_noise[part])

    def _predictions(self, statistics: RowStatistics, part: slice) -> _Predictions:
        """Return the leave-one-out prediction of the target and of z."""
        if self.observed is None:
            return _predictions(statistics)
        of_target, of_input = statistics.chosen.double() - statistics.largest
        of_input = of_input - self.observed[part]
        log_total = torch.logaddexp(statistics.total.double().log(), of_input)
        of_target = torch.where(self.targets[part] == self.inputs[part], of_input, of_target)
        return _Predictions(torch.stack([of_target, of_input]) - log_total, -log_total)

    def _sums(self, statistics: RowStatistics, predictions: _Predictions, mixture: _Mixture) -> Tensor:
        """Return the sums over all ids, also over z, [2, k]."""
        sums = statistics.sums.double()
        if self.observed is None:
            return sums
        prediction = predictions.named[1]
        signal = mixture.ratio * prediction
        return sums + torch.stack([signal.log1p(), prediction * _share(signal)])

    def _input_gradient(self, part: slice, mixture: _Mixture, predictions: _Predictions) -> Tensor:
        """Return the derivative of IS by the logit of z, before the softmax's own share of it, [k]."""
        of_input, log_prediction = _mixture(mixture.alpha, self.input_noise[part]), predictions.log_named[1]
        log_odds = of_input.log_odds(self.targets[part] == self.inputs[part], log_prediction)
        return torch.where(of_input.noise > 0, -of_input.share(log_prediction) * log_odds.expm1(), 0.0)


@dataclass(slots=True, frozen=True)
class FiniteKl(RowTerm):
    """KL(q(z_s | z, x) || p(z_s | z)) in nats, [m], of one step from t to s < t: the term of D3PM's bound (arXiv 2107.03006, eq. 1), where
    p(z_s | z) has the prediction p in the place of x. The bound of T steps is the sum over the steps, which is T times the mean.

    At s = 0 it is -log p(x | z) under the full posterior (``Reconstruction``). Callers give the noise in float64, because a step of length
    1/T leaves a number of order 1/T, which is a difference of numbers of order 1.
    """

    targets: Tensor
    """int64 [m]: x."""
    inputs: Tensor
    """int64 [m]: z, the id at t that the model saw."""
    alpha: Tensor
    """float64 [m]: alpha_t."""
    input_noise: Tensor
    """float64 [m]: c_t(z)."""
    earlier_alpha: Tensor
    """float64 [m]: alpha_s."""
    earlier_word_noise: Tensor
    """float64 [m]: c_s of one ordinary id."""
    earlier_input_noise: Tensor
    """float64 [m]: c_s(z)."""
    mask_token_id: int | None = None
    """Id of the mask, if it is in the softmax and its noise differs from that of ordinary ids, as in D3PM; None: every id of the softmax is
    an ordinary id."""
    earlier_mask_noise: Tensor | None = None
    """float64 [m]: c_s of the mask; given with ``mask_token_id``."""

    @property
    def chosen_ids(self) -> Tensor:
        named = [self.targets, self.inputs]
        return torch.stack(named if self.mask_token_id is None else [*named, torch.full_like(self.targets, self.mask_token_id)])

    @property
    def num_sums(self) -> int:
        return 2

    def local_sums(self, logits: Tensor, part: slice, statistics: RowStatistics, vocabulary: Vocabulary) -> Tensor:
        return _local_sums(logits, _predictions(statistics), self._earlier(part), statistics, vocabulary)

    def value(self, statistics: RowStatistics) -> Tensor:
        every = slice(None)
        predictions, (at_s, step) = _predictions(statistics), self._factors(every)
        is_target, log_input = self.targets == self.inputs, predictions.log_named[1]
        odds_at_s = _mixture(self.earlier_alpha, self.earlier_input_noise).log_odds(is_target, log_input)
        odds_at_t = _mixture(self.alpha, self.input_noise).log_odds(is_target, log_input)
        value = torch.where(at_s > 0, at_s * odds_at_s, 0.0) + step * self._divergence(statistics, predictions) - odds_at_t
        return value.to(statistics.total.dtype)

    def write_gradient(self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
        predictions, earlier, (at_s, step) = _predictions(statistics), self._earlier(part), self._factors(part)
        log_input, shares = predictions.log_named[1], statistics.sums[1].double()
        share_at_s = _mixture(earlier.alpha, self.earlier_input_noise[part]).share(log_input)
        share_at_t = _mixture(self.alpha[part], self.input_noise[part]).share(log_input)
        of_input = share_at_t - torch.where(at_s > 0, at_s * share_at_s, 0.0)
        slope = step * earlier.alpha
        of_target = slope * earlier.share(predictions.log_named[0])
        named = [-of_target, of_input]
        mask = self._mask(part)
        if mask is not None:
            prediction = predictions.named[2]
            difference = prediction * (mask.share(predictions.log_named[2]) - _share(earlier.ratio * prediction))
            shares = shares + difference
            named.append(slope * difference)
        columns = self.chosen_ids[:, part] - vocabulary.first_token
        base = of_target - slope * shares - of_input
        _write_gradient(logits, columns, predictions, earlier, statistics, _Gradient(base, slope, torch.stack(named)), gradient, vocabulary)

    def _earlier(self, part: slice) -> _Mixture:
        return _mixture(self.earlier_alpha[part], self.earlier_word_noise[part])

    def _mask(self, part: slice) -> _Mixture | None:
        """Return the law at s with the noise of the mask, if the softmax has the mask."""
        if self.earlier_mask_noise is None:
            return None
        return _mixture(self.earlier_alpha[part], self.earlier_mask_noise[part])

    def _factors(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return the factors of log(q_s(z | x) / q_s(z | p)) and of KL(q_s(. | x) || q_s(. | p)), [k].

        Bayes' rule gives q(y | z, x) = q_s(y | x) (alpha_{t|s} [y = z] + c_{t|s}(z)) / q_t(z | x), where alpha_{t|s} = alpha_t / alpha_s
        and c_{t|s} = c_t - alpha_{t|s} c_s.
        """
        is_target = (self.targets[part] == self.inputs[part]).double()
        alpha, noise = self.alpha[part].double(), self.input_noise[part].double()
        earlier_alpha, earlier_noise = self.earlier_alpha[part].double(), self.earlier_input_noise[part].double()
        kept, total = alpha / earlier_alpha, alpha * is_target + noise
        return kept * (earlier_alpha * is_target + earlier_noise) / total, (noise - kept * earlier_noise) / total

    def _divergence(self, statistics: RowStatistics, predictions: _Predictions) -> Tensor:
        """Return KL(q_s(. | x) || q_s(. | p)), [m]."""
        every = slice(None)
        earlier, mask, logarithms = self._earlier(every), self._mask(every), statistics.sums[0].double()
        if mask is None:
            return earlier.divergence(predictions.log_named[0], logarithms)
        # The sum has the mask as if it were an ordinary id.
        logarithms = logarithms - (earlier.ratio * predictions.named[2]).log1p()
        log_odds = mask.log_odds(torch.zeros_like(self.targets, dtype=torch.bool), predictions.log_named[2])
        of_mask = torch.where(mask.noise > 0, mask.noise * log_odds, 0.0)
        return earlier.divergence(predictions.log_named[0], logarithms) + of_mask


def _mixture(alpha: Tensor, noise: Tensor) -> _Mixture:
    # Where alpha and c are both zero, as those of ordinary ids under masked noise at t = 1, their ratio would be NaN.
    return _Mixture(alpha.double().clamp_min(SMALLEST_ALPHA), noise.double())


@dataclass(slots=True, frozen=True)
class _Gradient:
    """The derivative of a divergence by the logits of k rows, p (base + slope u) plus ``named`` at the ids that the term names, where u is
    the share of the prediction in the noised probability; float64."""

    base: Tensor
    slope: Tensor
    named: Tensor
    """[n, k]."""


def _predictions(statistics: RowStatistics) -> _Predictions:
    log_total = statistics.total.double().log()
    return _Predictions(statistics.chosen.double() - statistics.largest - log_total, -log_total)


def _share(signal: Tensor) -> Tensor:
    return signal / (1 + signal)


def _local_sums(logits: Tensor, predictions: _Predictions, mixture: _Mixture, statistics: RowStatistics, vocabulary: Vocabulary) -> Tensor:
    precision = statistics.largest.dtype
    scale, ratio = predictions.log_scale.exp().to(precision), mixture.ratio.to(precision)
    return noised_sums(logits, statistics.largest, scale, ratio, vocabulary.implementation)


def _write_gradient(
    logits: Tensor,
    columns: Tensor,
    predictions: _Predictions,
    mixture: _Mixture,
    statistics: RowStatistics,
    derivative: _Gradient,
    gradient: Tensor,
    vocabulary: Vocabulary,
) -> None:
    """Write gradient * derivative over the logits."""
    precision = statistics.largest.dtype
    scale, ratio = predictions.log_scale.exp().to(precision), mixture.ratio.to(precision)
    base, slope, named = ((gradient * values).to(precision) for values in (derivative.base, derivative.slope, derivative.named))
    write_gradient(logits, columns, statistics.largest, scale, ratio, base, slope, named, vocabulary.implementation)
