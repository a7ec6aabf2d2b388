"""Kernels of the cross-entropy, each with its Triton twin: the numbers that a softmax needs of each row of logits, and the logits'
gradient.

They see only the logits of this rank. Sums over the ranks that share a vocabulary are taken in w1train/model/chunked_head.py.

Shapes: k = rows of a chunk, v = vocabulary of this rank, n = columns that are read in each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w1train.kernels.selection import Implementation, runs_triton


def row_statistics(logits: Tensor, columns: Tensor, implementation: Implementation) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's largest logit, its sum of exp(logit - largest), and its logits at some columns, in float32.

    Args:
        logits: [k, v].
        columns: int64 [n, k]. A column outside [0, v) is on another rank, and 0 is returned in its place.

    Returns:
        [k], [k] and [n, k].
    """
    if runs_triton(logits, implementation):
        from w1train.kernels import triton_cross_entropy

        return triton_cross_entropy.row_statistics(logits, columns)
    here, columns = on_this_rank(columns, logits)
    chosen = logits.gather(-1, columns.t()).t().float()
    largest = logits.amax(dim=-1).float()
    total = logits.sub(largest[:, None]).exp_().sum(dim=-1)  # in fp32, as ``largest`` is
    return largest, total, torch.where(here, chosen, 0.0)


def write_gradient(
    logits: Tensor, columns: Tensor, largest: Tensor, scale: Tensor, gradients: Tensor, implementation: Implementation
) -> None:
    """Write exp(logit - largest) * scale over the logits, less a row's gradients at its columns.

    With scale = (sum of a row's gradients) / (its sum of exponentials), this is the gradient of the sum of gradient * -log p(column).

    Args:
        logits: [k, v].
        columns: int64 [n, k], as in ``row_statistics``.
        largest, scale: float32 [k].
        gradients: float32 [n, k].
    """
    if runs_triton(logits, implementation):
        from w1train.kernels import triton_cross_entropy

        triton_cross_entropy.write_gradient(logits, columns, largest, scale, gradients)
        return
    wide = logits.sub(largest[:, None]).exp_().mul_(scale[:, None])
    here, columns = on_this_rank(columns, logits)
    wide.scatter_add_(-1, columns.t(), torch.where(here, -gradients, 0.0).t())
    logits.copy_(wide)


def on_this_rank(columns: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return which columns these logits have, and the columns with 0 in the place of columns that they do not have."""
    here = (columns >= 0) & (columns < logits.shape[-1])
    return here, torch.where(here, columns, 0)
