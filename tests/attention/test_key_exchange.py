"""The exchange between ranks is a permutation: what it brings, what its gradient is, and what it keeps for it."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed
from w1train.attention.context_parallel import deal_positions, key_exchange
from w1train.attention.visibility import document_visibility

NUM_RANKS, LENGTH = 2, 16


def _exchange(travel):
    """Two samples whose positions are dealt differently."""
    documents = torch.stack([torch.arange(LENGTH) // 8, torch.arange(LENGTH).clamp_max(3)]).int()
    ownership = deal_positions(document_visibility(documents), 1, NUM_RANKS, 2)
    assert not torch.equal(ownership.positions[0], ownership.positions[1])
    return ownership, key_exchange(ownership, 1, travel, dist.group.WORLD)


def _there_and_back(rank, _size, num_heads):
    _, exchange = _exchange("heads")
    generator = torch.Generator().manual_seed(rank)
    query, weight = (torch.randn((LENGTH // NUM_RANKS, 2, num_heads, 3), generator=generator) for _ in range(2))
    query.requires_grad_()
    moved = exchange.exchange(query, query, query)[0]
    # Attention's kernels return [b, heads, rows, d] in memory: the strides of a transpose.
    transposed = moved.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    returned = exchange.restore(transposed)
    # A gradient with other strides again.
    (returned * weight).permute(3, 2, 1, 0).contiguous().sum().backward()
    return torch.equal(returned, query), torch.equal(query.grad, weight)


@pytest.mark.parametrize("num_heads", [2, 4, 8])
def test_heads_come_back_where_they_were(num_heads):
    """Several heads and samples a rank: with one, every order of strides is the same memory."""
    for values, gradients in run_distributed(_there_and_back, NUM_RANKS, num_heads):
        assert values
        assert gradients
