"""The pools of experts that the tokens of a block share (LLaDA2.2).

No paper gives the rule; it is that of the released model's inference code: the pool of a block has the experts with the largest maximum of
score + bias over the block's tokens, and each token takes its best experts in the pool. It is our choice that a block is the tokens of one
block of one document in one stream, so that no token depends on another document, nor the clean stream on the noise.

Shapes: T = tokens of this rank, E = experts, P = experts of a pool, k = active experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class RoutingBlocks:
    """The block of each token."""

    index: Tensor
    """int64 [b, l] (in RoutedTokens [s, b]): a number that only the tokens of one block have."""
    num_blocks: int
    """A number above every index, the same on all ranks that share the samples."""


def choose_in_pools(scores: Tensor, blocks: RoutingBlocks, pool_size: int, num_active: int, group: dist.ProcessGroup | None) -> Tensor:
    """Return the experts of each token, int64 [T, k].

    Args:
        scores: [T, E], score + bias.
        pool_size: P.
        num_active: k.
        group: the ranks that have the other tokens of the blocks; None = there are no other tokens.
    """
    index = blocks.index.flatten()
    largest = scores.new_full((blocks.num_blocks, scores.shape[1]), -torch.inf)
    largest.scatter_reduce_(0, index[:, None].expand_as(scores), scores, "amax")
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    pools = torch.zeros_like(largest, dtype=torch.bool).scatter_(1, largest.topk(pool_size, dim=1).indices, True)
    return scores.masked_fill(~pools[index], -torch.inf).topk(num_active, dim=1).indices
