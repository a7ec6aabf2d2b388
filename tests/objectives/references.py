"""Each loss by its definition, from the whole distributions over the vocabulary, in float64.

Shapes: m = rows, v = vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.diffusion.process import NoiseProcess
from w1train.objectives.loss_rows import LossRows


def noised_laws(process: NoiseProcess, t: Tensor, of_token: Tensor) -> Tensor:
    """Return q_t(. | a distribution over tokens), [m, v], of distributions [m, v]."""
    ids = torch.arange(of_token.shape[1])[None]
    return process.alpha(t)[:, None] * of_token + process.noise(t[:, None], ids)


def reference_values(config: DiffusionConfig, process: NoiseProcess, rows: LossRows, logits: Tensor) -> Tensor:
    """Return the trained loss of each row without its weight, [m], from logits [m, v] with -inf at ids that cannot be predicted."""
    t, x, z = rows.timesteps.double(), rows.targets[: len(rows.inputs)], rows.inputs
    if config.loss == "kl_is" and config.prediction == "full":
        observed = torch.log1p(process.alpha(t) / process.noise(t, z))
        logits = logits - torch.nn.functional.one_hot(z, logits.shape[1]) * observed[:, None]
    log_p = logits.log_softmax(dim=1)
    one_hot = torch.nn.functional.one_hot(x, logits.shape[1]).double()
    references = {
        "cross_entropy": _cross_entropy,
        "kl_is": _kl_is,
        "finite_kl": _finite_kl,
        "score_entropy": _score_entropy,
        "reconstruction": _reconstruction,
    }
    return references[config.loss](config, process, t, x, z, one_hot, log_p, logits)


def _at(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(1, ids[:, None])[:, 0]


def _divergence(true: Tensor, predicted: Tensor) -> Tensor:
    """Return KL(true || predicted) of rows, with 0 log 0 = 0."""
    return torch.where(true > 0, true * (torch.where(true > 0, true, 1).log() - torch.where(true > 0, predicted, 1).log()), 0).sum(dim=1)


def _cross_entropy(config, process, t, x, z, one_hot, log_p, logits):
    plain = -_at(log_p, x)
    possible = torch.isfinite(logits)
    smooth = -torch.where(possible, log_p, 0).sum(dim=1) / possible.sum(dim=1)
    return ((1 - config.label_smoothing) * plain + config.label_smoothing * smooth) * (1 - (-plain).exp()) ** config.focal_gamma


def _kl_is(config, process, t, x, z, one_hot, log_p, logits):
    true, predicted = noised_laws(process, t, one_hot), noised_laws(process, t, log_p.exp())
    ratio = _at(true, z) / _at(predicted, z)
    return _divergence(true, predicted) + ratio - ratio.log() - 1


def _finite_kl(config, process, t, x, z, one_hot, log_p, logits):
    before = t - 1 / config.num_timesteps
    before = (before * config.num_timesteps).round() / config.num_timesteps
    now = (t * config.num_timesteps).round() / config.num_timesteps
    kept = process.alpha(now) / process.alpha(before)
    jump = process.noise(now, z) - kept * process.noise(before, z)
    step = kept[:, None] * torch.nn.functional.one_hot(z, logits.shape[1]) + jump[:, None]
    posteriors = []
    for of_token in (one_hot, log_p.exp()):
        posterior = step * noised_laws(process, before, of_token)
        posteriors.append(posterior / posterior.sum(dim=1, keepdim=True))
    return _divergence(*posteriors)


def _score_entropy(config, process, t, x, z, one_hot, log_p, logits):
    true = noised_laws(process, t, one_hot)
    ratios = true / _at(true, z)[:, None]
    # Under masked noise SEDD's released model subtracts log(exp(sigma) - 1) and log(number of ids) from its outputs, with
    # alpha = exp(-sigma).
    num_ids = torch.isfinite(logits).sum(dim=1)
    scale = torch.log(process.alpha(t) / (1 - process.alpha(t)) / num_ids) if config.objective == "diffusion" else torch.zeros_like(t)
    log_scores = logits + scale[:, None]
    counted = torch.isfinite(logits) & (torch.arange(logits.shape[1]) != z[:, None])
    log_scores = torch.where(counted, log_scores, 0)
    terms = log_scores.exp() - ratios * log_scores + torch.where(ratios > 0, ratios * (torch.where(ratios > 0, ratios, 1).log() - 1), 0)
    return torch.where(counted, terms, 0).sum(dim=1) * _at(true, z)


def _reconstruction(config, process, t, x, z, one_hot, log_p, logits):
    likelihood = process.alpha(t)[:, None] * torch.nn.functional.one_hot(z, logits.shape[1]) + process.noise(t, z)[:, None]
    return -_at((log_p + likelihood.log()).log_softmax(dim=1), x)
