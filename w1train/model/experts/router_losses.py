"""The losses that a router adds to the objective: one is smallest if a sample uses all experts alike, one keeps logits small.

A sample i has the terms

    balance_i = E / (k T_i^2) sum_e (tokens of e) (sum over tokens of p_e)      (arXiv 2101.03961, equation 4, for one sample)
    z_i       = 1 / T_i sum over tokens of logsumexp(logits)^2                  (arXiv 2202.08906, equation 5)

over its T_i counted tokens. balance_i is 1 if all experts are used alike. The tokens of e are those that the router has sent to e, with
bias and groups, and p are the scores over all experts, which have the sum 1. The objective is a sum over tokens or samples, divided by a
denominator D, of which sample i has the part d_i. The loss of all layers is

    objective + sum over layers, sum over i of d_i / D (auxiliary balance_i + router_z z_i),

so that a coefficient means the same for each normaliser, layout and size of micro-batches. Gradients are divided by D at the end of a step.

Shapes: s = tokens of this rank, b = samples, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class RouterLosses:
    """The losses that routers add for a micro-batch."""

    auxiliary: float
    """balance.auxiliary."""
    router_z: float
    """balance.router_z."""
    first_counted: int
    """The first TokenKind that counts; all later kinds count too."""
    denominators: Tensor
    """float32 [b]: d_i."""
    num_counted: Tensor
    """float32 [b]: T_i, of all ranks that share sample i."""

    def values(
        self, logits: Tensor, is_chosen: Tensor, kinds: Tensor, score: str, num_active: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        """Return this rank's part of sum d_i balance_i, of sum d_i z_i and of sum d_i, float32 [3]. A loss with the coefficient 0 is 0.

        Args:
            logits: [s, b, E].
            is_chosen: bool [s, b, E].
            kinds: uint8 [s, b].
            score: model.experts.score.
            num_active: k.
            group: the ranks that have the other tokens of the samples; None = there are no other tokens.
        """
        logits = logits.float()
        is_counted = (kinds >= self.first_counted).to(logits.dtype)
        per_token = self.denominators / self.num_counted.clamp_min(1)
        balance = z = logits.new_zeros(())
        if self.auxiliary:
            counts = torch.einsum("sbe,sb->be", is_chosen.to(logits.dtype), is_counted)
            if group is not None:
                dist.all_reduce(counts, group=group)
            scores = torch.einsum("sbe,sb->be", PROBABILITIES[score](logits), is_counted)
            factor = logits.shape[-1] / num_active * per_token / self.num_counted.clamp_min(1)
            balance = (factor[:, None] * counts * scores).sum()
        if self.router_z:
            z = (per_token * is_counted * logits.logsumexp(dim=-1).square()).sum()
        return torch.stack([balance, z, (per_token * is_counted).sum()])

    def loss(self, values: Tensor) -> Tensor:
        """Return what the gradient is taken of, from ``values``."""
        return self.auxiliary * values[0] + self.router_z * values[1]


def _normalized_sigmoid(logits: Tensor) -> Tensor:
    scores = torch.sigmoid(logits)
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda logits: logits.softmax(dim=-1), "sigmoid": _normalized_sigmoid}
"""Scores over all experts with the sum 1, for each value of model.experts.score."""


class AddLoss(torch.autograd.Function):
    """The identity, whose backward pass gives a loss the gradient 1: the loss is differentiated like the sum of the micro-batch's losses,
    which has the gradient 1 too, on whichever pipeline stage it is."""

    @staticmethod
    def forward(ctx: Any, passed: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return passed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return gradient, torch.ones_like(loss)
