"""Context parallelism: which rank owns which positions, and how keys reach the queries that see them.

Positions are dealt to ranks in chunks, the same chunks of the noisy and of the clean stream. Every rank owns equally many positions and
nearly equally many visible pairs. Contiguous or zig-zag splits cannot balance packed documents, because the work of a chunk
depends on where its documents begin.

Each rank computes attention for the queries of its own positions. What ranks exchange (``Travel``) is one of:

- ``clean`` keys (block diffusion): a rank has the keys [gathered x_0 in sample order ; own x_t]. Noisy keys are not exchanged, because only
  the block itself sees them. This needs every noisy block inside one chunk.
- ``all`` keys (one stream, or blocks that cross chunk borders): a rank has all positions of all streams, in sample order.
- ``heads`` (Ulysses, arXiv 2309.14509): a rank has all positions of some heads.

Every rank computes which rank owns which positions, as a function of the documents. Visibility is described for each query row, so kernels
are equally fast whatever positions a rank owns.

Shapes: b = samples, l = sequence_length, c = context-parallel ranks, n = l / c positions of a rank, p = number of streams
(1 or 2), k = keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from w1train.attention.visibility import Visibility
from w1train.data.documents import block_bounds

Travel = Literal["clean", "all", "heads"]


@dataclass(slots=True)
class Ownership:
    """The positions of each context-parallel rank, in ascending order."""

    positions: Tensor
    """int64 [b, c, n]."""
    balance: float
    """The balance of the work: the largest number of visible pairs of a rank's queries, divided by the mean over ranks, in the whole
    micro-batch."""


def deal_positions(visibility: Visibility, num_streams: int, num_ranks: int, chunk_size: int) -> Ownership:
    """Deal equally many chunks of positions to each rank so that visible pairs are balanced: chunks with more pairs come first, and each
    goes to the rank with fewest pairs.

    Args:
        visibility: the visibility of the whole sequence; with two streams its rows are [x_t ; x_0].
        chunk_size: positions of a chunk; l must be a multiple of num_ranks * chunk_size.
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
    """Return the chunks of each rank, in ascending order, and the sum of their costs."""
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
    """The exchange of keys in one micro-batch, for one rank and all layers."""

    travel: Travel
    group: Any
    """The context-parallel process group."""
    num_streams: int
    gathered_to_sample: Tensor
    """int64 [b, rows]: for each key in sample order, its place in the concatenation of the ranks' rows."""
    sample_to_gathered: Tensor
    """int64 [b, rows]: the inverse permutation."""

    def exchange(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query, key and value that attention reads, from the query, key and value of this rank's positions, [rows, b, heads,
        d]."""
        if self.travel == "heads":
            return tuple(self._heads_to_positions(tensor) for tensor in (query, key, value))
        # One collective for key and value has half the latency of two collectives.
        gathered = self._gather(torch.cat([key, value], dim=-1))
        return query, *gathered.split([key.shape[-1], value.shape[-1]], dim=-1)

    def restore(self, output: Tensor) -> Tensor:
        """Return the attention's output of this rank's positions, [rows, b, heads, d]."""
        if self.travel != "heads":
            return output
        size = dist.get_world_size(self.group)
        ordered = _Reorder.apply(output, self.sample_to_gathered, self.gathered_to_sample)
        return _AllToAll.apply(ordered.unflatten(0, (size, -1)), self.group).movedim(0, 2).flatten(2, 3)

    def _gather(self, tensor: Tensor) -> Tensor:
        """Return all keys that this rank needs, [k, b, heads, d], from its own keys, [rows, b, heads, d]."""
        own_noisy = None
        if self.travel == "clean":
            own_noisy, tensor = tensor.chunk(2)
        gathered = _AllGather.apply(tensor.contiguous(), self.group)
        ordered = _Reorder.apply(gathered, self.gathered_to_sample, self.sample_to_gathered)
        return ordered if own_noisy is None else torch.cat([ordered, own_noisy])

    def _heads_to_positions(self, tensor: Tensor) -> Tensor:
        """Return all positions of some heads in sample order, [c * rows, b, heads / c, d], from [rows, b, heads, d]."""
        size = dist.get_world_size(self.group)
        by_head = tensor.unflatten(2, (size, -1)).movedim(2, 0).contiguous()
        gathered = _AllToAll.apply(by_head, self.group).flatten(0, 1)
        return _Reorder.apply(gathered, self.gathered_to_sample, self.sample_to_gathered)


def key_exchange(ownership: Ownership, num_streams: int, travel: Travel, group: Any) -> KeyExchange:
    """Return the exchange of keys for the positions that each context-parallel rank owns. A rank's rows are its positions of x_t and then,
    with two streams, the same positions of
    x_0."""
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
    """Return the visibility of this rank's query rows, with the places that keys have after the exchange."""
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
    """Return endpoints over keys [x_0 ; own x_t], from endpoints over keys [x_t ; x_0]: the clean interval comes before the noisy block.

    The given endpoints are (0, block start, block end, l + clean start, l + clean end) in noisy rows, and (0, l + start, l + end, l + end,
    l + end) in clean rows.
    """
    num_own = own.shape[1]
    noisy, clean = endpoints.split([num_own, num_own], dim=2)
    zero = torch.zeros_like(noisy[0])
    real = noisy[2] > noisy[1]
    # A block is inside one chunk. It is therefore contiguous among the rank's positions, and starts as far before the row as in the sample.
    place = torch.arange(num_own, device=own.device, dtype=torch.int32)
    shift = (place - own.to(torch.int32)) + length
    new_noisy = torch.stack([zero, noisy[3] - length, noisy[4] - length, noisy[1] + shift, noisy[2] + shift])
    new_clean = torch.stack([zero, *((endpoint - length) for endpoint in clean[1:])])
    seen = clean[2] > clean[1]
    return torch.cat([torch.where(real, new_noisy, zero), torch.where(seen, new_clean, zero)], dim=2)


def blocks_stay_home(document_ids: Tensor, block_size: int, block_index: Literal["document", "sample"], chunk_size: int) -> bool:
    """Tell whether every block is inside one chunk, so that no rank needs the noisy keys of another rank. Padding sees nothing and needs no
    key."""
    start, end = block_bounds(document_ids, block_size, block_index)
    inside = torch.div(start, chunk_size, rounding_mode="floor") == torch.div(end - 1, chunk_size, rounding_mode="floor")
    return bool((inside | (document_ids < 0)).all())


def _rows_index(order: Tensor, tensor: Tensor) -> Tensor:
    """Return an index for ``tensor.gather(0, ...)`` on [rows, b, heads, d], from order [b, rows]."""
    return order.transpose(0, 1)[:, :, None, None].expand(-1, -1, *tensor.shape[2:])


class _Reorder(torch.autograd.Function):
    """A permutation of the rows of each sample, of [rows, b, heads, d] by int64 [b, rows].

    Autograd's own gather would keep its input for the backward pass, and add up its gradient with atomics. The gradient of a permutation
    is a gather by the inverse permutation.
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
    """Concatenation over ranks along dimension 0. The backward pass adds up the ranks' gradients of each row (reduce-scatter)."""

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
    """An exchange in which rank i gets slice i of dimension 0 from each rank. It is its own inverse, and its own backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _exchange_slices(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange_slices(gradient, ctx.group), None


def _exchange_slices(tensor: Tensor, group: Any) -> Tensor:
    # The collective ignores strides: a result with the strides of a transposed input would be scrambled without an error.
    output = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    dist.all_to_all_single(output, tensor.contiguous(), group=group)
    return output
