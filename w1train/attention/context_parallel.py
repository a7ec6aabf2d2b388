"""Context parallelism: which rank owns which positions, and how keys reach the queries that see them.

Positions are dealt in chunks, the same chunks of the noisy and the clean stream, so that every rank owns as many positions
and (nearly) as many visible pairs. Contiguous or zig-zag splits cannot balance packed documents: a chunk's work depends on
where its documents begin, not on where the sample does.

Each rank computes attention for the queries of its own positions:

- ``clean`` keys travel (block diffusion): keys are [gathered x_0 in sample order ; own x_t]. Noisy keys stay at home, for a
  noisy block is seen by itself alone. Needs every noisy block inside one chunk.
- ``all`` keys travel (one stream, or blocks that cross chunk borders): keys are all positions of all streams, in sample order.
- ``heads`` travel (Ulysses): each rank has all positions of some heads.

Which rank owns what is a function of the documents, computed alike on every rank; visibility is per query row, so any
ownership costs the kernels nothing.

Shapes: b = samples, l = sequence_length, c = context-parallel ranks, n = l / c positions of a rank, p = number of streams
(1 or 2), k = keys.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from w1train.attention.visibility import Visibility
from w1train.data.documents import block_bounds

logger = logging.getLogger(__name__)

Travel = Literal["clean", "all", "heads"]


@dataclass(slots=True)
class Ownership:
    """The positions of each context-parallel rank, in ascending order."""

    positions: Tensor
    """int64 [b, c, n]."""
    balance: float
    """max / mean over ranks of the visible pairs of their queries, of the whole micro-batch."""


def deal_positions(visibility: Visibility, num_streams: int, num_ranks: int, chunk_size: int) -> Ownership:
    """Deal chunks of positions to ranks: each as many, visible pairs balanced (longest first to the least loaded).

    Args:
        visibility: of the whole sequence, rows [x_t ; x_0] for two streams.
        chunk_size: positions per chunk; l must be a multiple of num_ranks * chunk_size.
    """
    num_samples, num_rows = visibility.endpoints.shape[1:]
    length = num_rows // num_streams
    assert length % (num_ranks * chunk_size) == 0, (length, num_ranks, chunk_size)
    costs = visibility.pairs_per_row().reshape(num_samples, num_streams, -1, chunk_size).sum(dim=(1, 3))
    owners, loads = zip(*(_deal(row, num_ranks) for row in costs.tolist()), strict=True)
    chunks = torch.tensor(owners, device=visibility.endpoints.device)
    positions = chunks[..., None] * chunk_size + torch.arange(chunk_size, device=chunks.device)
    total = torch.tensor(loads, dtype=torch.float64).sum(dim=0)
    return Ownership(positions.reshape(num_samples, num_ranks, -1), float(total.max() / total.mean().clamp_min(1.0)))


def _deal(costs: list[int], num_ranks: int) -> tuple[list[list[int]], list[int]]:
    """Chunks of each rank (ascending) and its load."""
    capacity = len(costs) // num_ranks
    chunks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for chunk in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        open_ranks = (rank for rank in range(num_ranks) if len(chunks[rank]) < capacity)
        rank = min(open_ranks, key=lambda rank: (loads[rank], rank))
        chunks[rank].append(chunk)
        loads[rank] += costs[chunk]
    return [sorted(part) for part in chunks], loads


@dataclass(slots=True)
class KeyExchange:
    """One micro-batch's key exchange on one rank; shared by all layers."""

    travel: Travel
    group: Any
    """The context-parallel process group."""
    num_streams: int
    gathered_to_sample: Tensor
    """int64 [b, rows]: for each key in sample order, its place in the ranks' rows laid end to end."""
    sample_to_gathered: Tensor
    """int64 [b, rows]: its inverse."""

    def exchange(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, b, heads, d] of own positions -> what attention runs on."""
        if self.travel == "heads":
            return tuple(self._heads_to_positions(tensor) for tensor in (query, key, value))
        # One collective for both: half the latencies.
        gathered = self._gather(torch.cat([key, value], dim=-1))
        return query, *gathered.split([key.shape[-1], value.shape[-1]], dim=-1)

    def restore(self, output: Tensor) -> Tensor:
        """The attention's output back at the positions' owner: [rows, b, heads, d]."""
        if self.travel != "heads":
            return output
        size = dist.get_world_size(self.group)
        ordered = _Reorder.apply(output, self.sample_to_gathered, self.gathered_to_sample)
        return _AllToAll.apply(ordered.unflatten(0, (size, -1)), self.group).movedim(0, 2).flatten(2, 3)

    def _gather(self, tensor: Tensor) -> Tensor:
        """Keys: [rows, b, heads, d] -> [k, b, heads, d]."""
        own_noisy = None
        if self.travel == "clean":
            own_noisy, tensor = tensor.chunk(2)
        gathered = _AllGather.apply(tensor.contiguous(), self.group)
        ordered = _Reorder.apply(gathered, self.gathered_to_sample, self.sample_to_gathered)
        return ordered if own_noisy is None else torch.cat([ordered, own_noisy])

    def _heads_to_positions(self, tensor: Tensor) -> Tensor:
        """[rows, b, heads, d] -> [c * rows, b, heads / c, d] in sample order."""
        size = dist.get_world_size(self.group)
        by_head = tensor.unflatten(2, (size, -1)).movedim(2, 0).contiguous()
        gathered = _AllToAll.apply(by_head, self.group).flatten(0, 1)
        return _Reorder.apply(gathered, self.gathered_to_sample, self.sample_to_gathered)


def key_exchange(ownership: Ownership, num_streams: int, travel: Travel, group: Any) -> KeyExchange:
    """The exchange for an ownership. Rows of a rank: its positions of x_t, then (two streams) the same of x_0."""
    num_samples, num_ranks, num_own = ownership.positions.shape
    streams = 1 if travel == "clean" else num_streams
    length = num_ranks * num_own
    # place[b, rank, stream, i] = row in the concatenation of the ranks' rows
    place = torch.arange(num_ranks * streams * num_own, device=ownership.positions.device)
    place = place.reshape(num_ranks, streams, num_own).expand(num_samples, -1, -1, -1)
    target = ownership.positions[:, :, None, :] + length * torch.arange(streams, device=place.device)[None, None, :, None]
    order = torch.empty((num_samples, streams * length), dtype=torch.int64, device=place.device)
    order.scatter_(1, target.flatten(1), place.flatten(1))
    return KeyExchange(travel, group, num_streams, order, target.flatten(1))


def local_visibility(visibility: Visibility, ownership: Ownership, rank: int, num_streams: int, travel: Travel) -> Visibility:
    """Visibility of this rank's query rows, in the coordinates of the keys it will have."""
    if travel == "heads":
        return visibility
    own = ownership.positions[:, rank]
    length = ownership.positions.shape[1] * ownership.positions.shape[2]
    rows = torch.cat([own + stream * length for stream in range(num_streams)], dim=1)
    endpoints = visibility.endpoints.gather(2, rows.expand(visibility.endpoints.shape[0], -1, -1))
    if travel == "all":
        return Visibility(endpoints, visibility.num_keys)
    return Visibility(_clean_first(endpoints, own, length), length + own.shape[1])


def _clean_first(endpoints: Tensor, own: Tensor, length: int) -> Tensor:
    """From keys [x_t ; x_0] to keys [x_0 ; own x_t]: the own noisy block comes last, the clean interval before it.

    Noisy rows have (0, block start, block end, l + clean start, l + clean end), clean rows (0, l + start, l + end, =, =).
    """
    num_own = own.shape[1]
    noisy, clean = endpoints.split([num_own, num_own], dim=2)
    zero = torch.zeros_like(noisy[0])
    real = noisy[2] > noisy[1]
    # A block lies inside one chunk, so it is contiguous among the rank's positions and starts as far before the row there.
    place = torch.arange(num_own, device=own.device, dtype=torch.int32)
    shift = (place - own.to(torch.int32)) + length
    new_noisy = torch.stack([zero, noisy[3] - length, noisy[4] - length, noisy[1] + shift, noisy[2] + shift])
    new_clean = torch.stack([zero, *((endpoint - length) for endpoint in clean[1:])])
    seen = clean[2] > clean[1]
    return torch.cat([torch.where(real, new_noisy, zero), torch.where(seen, new_clean, zero)], dim=2)


def blocks_stay_home(document_ids: Tensor, block_size: int, block_index: Literal["document", "sample"], chunk_size: int) -> bool:
    """Whether every block lies inside one chunk, so that no noisy key has to travel. Padding sees nothing and needs no key."""
    start, end = block_bounds(document_ids, block_size, block_index)
    inside = torch.div(start, chunk_size, rounding_mode="floor") == torch.div(end - 1, chunk_size, rounding_mode="floor")
    return bool((inside | (document_ids < 0)).all())


def _rows_index(order: Tensor, tensor: Tensor) -> Tensor:
    """[b, rows] -> an index for ``tensor.gather(0, ...)`` on [rows, b, heads, d]."""
    return order.transpose(0, 1)[:, :, None, None].expand(-1, -1, *tensor.shape[2:])


class _Reorder(torch.autograd.Function):
    """Permute the rows of each sample: [rows, b, heads, d] by int64 [b, rows].

    Autograd's own gather keeps its input for backward and adds with atomics; a permutation's gradient is a gather by the inverse.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return tensor.gather(0, _rows_index(order, tensor))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.gather(0, _rows_index(inverse, gradient)), None, None


class _AllGather(torch.autograd.Function):
    """Concatenate over ranks along dimension 0; backward adds the ranks' gradients where they belong (reduce-scatter)."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        output = tensor.new_empty((dist.get_world_size(group) * tensor.shape[0], *tensor.shape[1:]))
        dist.all_gather_into_tensor(output, tensor, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        output = gradient.new_empty((gradient.shape[0] // dist.get_world_size(ctx.group), *gradient.shape[1:]))
        dist.reduce_scatter_tensor(output, gradient.contiguous(), group=ctx.group)
        return output, None


class _AllToAll(torch.autograd.Function):
    """Exchange slices of dimension 0 with the ranks of those numbers; its own inverse, and its own backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _exchange_slices(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange_slices(gradient, ctx.group), None


def _exchange_slices(tensor: Tensor, group: Any) -> Tensor:
    # The collective knows memory, not strides: a result with the strides of a transposed input would be scrambled without an error.
    output = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    dist.all_to_all_single(output, tensor.contiguous(), group=group)
    return output
