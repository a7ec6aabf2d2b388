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


def _kept_for_backward(_rank, _size, travel):
    _, exchange = _exchange(travel)
    kept = []
    query = torch.randn((LENGTH // NUM_RANKS, 2, 4, 3), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        exchange.restore(exchange.exchange(query, query, query)[0])
        exchange.exchange(query, query, query)
    return [str(tensor.dtype) for tensor in kept]


@pytest.mark.parametrize("travel", ["all", "heads"])
def test_backward_keeps_indices_only(travel):
    """Not the keys that arrived beside the keys in order: twice the memory of the longest tensors there are."""
    for kept in run_distributed(_kept_for_backward, NUM_RANKS, travel):
        assert set(kept) == {"torch.int64"}


def _gathered_gradient(rank, _size):
    ownership, exchange = _exchange("all")
    whole, weight = (torch.randn((LENGTH, 2, 4, 3), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    own = ownership.positions[:, rank].T[:, :, None, None].expand(-1, -1, 4, 3)
    key = whole.gather(0, own).requires_grad_()
    _, keys, values = exchange.exchange(key, key, 2 * key)
    ((keys + values) * weight * (rank + 1)).sum().backward()
    # Both ranks use every key, the second twice as much: (1 + 2) * (1 + 2) times the weight.
    return torch.equal(keys, whole), torch.allclose(key.grad, 9 * weight.gather(0, own))


def test_keys_arrive_in_sample_order_and_gradients_go_back_to_their_owner():
    for values, gradients in run_distributed(_gathered_gradient, NUM_RANKS):
        assert values
        assert gradients
