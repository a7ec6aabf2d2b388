"""Kernels of the divergences between noised tokens (KL and IS), each with its Triton twin: their sums over the vocabulary, and the logits'
gradient.

With p = the softmax and u = ratio p / (1 + ratio p), the share of the prediction in the noised probability of an id, the divergences need
the sums of log(1 + ratio p) and of p u, and the gradient of a logit is p (base + slope u), apart from the ids that a row names.

They see only the logits of this rank. Sums over the ranks that share a vocabulary are taken in w1train/model/chunked_head.py.

Shapes: k = rows of a chunk, v = vocabulary of this rank, n = columns that have a gradient of their own in each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w1train.kernels.cross_entropy import on_this_rank
from w1train.kernels.selection import Implementation, runs_triton


def noised_sums(logits: Tensor, largest: Tensor, scale: Tensor, ratio: Tensor, implementation: Implementation) -> Tensor:
    """Return the sums over the logits of log(1 + ratio p) and of p u, [2, k], in the precision of ``largest``.

    Args:
        logits: [k, v].
        largest, scale: [k]. p is exp(logit - largest) * scale.
        ratio: [k], finite.
    """
    if runs_triton(logits, implementation):
        from w1train.kernels import triton_noised_softmax

        return triton_noised_softmax.noised_sums(logits, largest, scale, ratio)
    predictions = logits.sub(largest[:, None]).exp_().mul_(scale[:, None])
    signal = predictions * ratio[:, None]
    logarithms = signal.log1p().sum(dim=-1)
    return torch.stack([logarithms, predictions.mul_(signal).div_(signal.add_(1)).sum(dim=-1)])


def write_gradient(
    logits: Tensor,
    columns: Tensor,
    largest: Tensor,
    scale: Tensor,
    ratio: Tensor,
    base: Tensor,
    slope: Tensor,
    gradients: Tensor,
    implementation: Implementation,
) -> None:
    """Write p (base + slope u) over the logits, plus a row's gradients at its columns.

    Args:
        logits: [k, v].
        columns: int64 [n, k]. A column outside [0, v) is on another rank.
        largest, scale, ratio: as in ``noised_sums``.
        base, slope: float32 [k].
        gradients: float32 [n, k].
    """
    if runs_triton(logits, implementation):
        from w1train.kernels import triton_noised_softmax

        triton_noised_softmax.write_gradient(logits, columns, largest, scale, ratio, base, slope, gradients)
        return
    predictions = logits.sub(largest[:, None]).exp_().mul_(scale[:, None])
    share = predictions * ratio[:, None]
    share.div_(share + 1).mul_(slope[:, None]).add_(base[:, None])
    here, columns = on_this_rank(columns, logits)
    predictions.mul_(share).scatter_add_(-1, columns.t(), torch.where(here, gradients, 0.0).t())
    logits.copy_(predictions)
