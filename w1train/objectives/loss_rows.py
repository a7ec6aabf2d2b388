"""What a loss knows about the rows of the model's output.

It is picked from a noisy batch before the model runs. Picking asks a GPU how many rows there are; asked after the forward pass, the host
would wait for the model before it launches the backward pass.

Shapes: m = rows of the noisy stream, k = rows of the clean stream, b, l as in NoisyBatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.diffusion.corruption import NoisyBatch


@dataclass(slots=True)
class LossRows:
    """The rows that a loss is taken of: the noisy stream's, in the order of ``NoisyBatch.loss_mask`` flattened, and behind them the clean
    stream's, in the order of ``NoisyBatch.next_mask``."""

    targets: Tensor
    """int64 [m + k], the right tokens."""
    timesteps: Tensor
    """float32 [m], t of the targets."""
    weights: Tensor
    """float32 [m], weights of the losses."""
    num_masked: Tensor
    """int64 scalar: m."""
    num_tokens: Tensor
    """int64 scalar: tokens that the objective is a likelihood of, in this draw predicted or not."""

    def of_noisy_stream(self, values: Tensor) -> Tensor:
        """Return the noisy stream's part of what was computed of all rows, [m]."""
        return values[: len(self.weights)]

    def of_clean_stream(self, values: Tensor) -> Tensor:
        """Return the clean stream's part of what was computed of all rows, [k]."""
        return values[len(self.weights) :]


def loss_rows(noisy: NoisyBatch, weights: Tensor) -> LossRows:
    """Pick the rows of a batch; ``weights``: float32 [b, l], of the losses of all outputs."""
    where = noisy.loss_mask.nonzero(as_tuple=True)
    targets = noisy.targets[where]
    if noisy.next_mask is not None and noisy.next_targets is not None:
        targets = torch.cat([targets, noisy.next_targets[noisy.next_mask]])
    return LossRows(
        targets=targets,
        timesteps=noisy.target_timesteps[where],
        weights=weights[where],
        num_masked=noisy.loss_mask.sum(),
        num_tokens=noisy.num_tokens,
    )
