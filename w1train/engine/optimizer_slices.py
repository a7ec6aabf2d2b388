"""The distributed optimizer's states in a checkpoint: each rank writes its own slice, as boxes of the parameters that the slice touches.

megatron-core's "fully reshardable" format stores a state under its parameter's name and in its shape, so that any layout can load it.
For a save it gathers all states of a model replica in the memory of every data-parallel rank: twelve bytes a parameter over the network
and in host memory, while training waits. But a slice of a flat buffer is a few boxes of each parameter that it touches (a piece of a row,
whole rows, a piece of a row), and a checkpoint may be made of any boxes. Here nothing is gathered, and every rank writes its own boxes.

Loading is left to megatron-core, which asks for whole parameters, whatever boxes they are stored in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import KEEP_VARS_HINT
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_FORMAT = "fully_reshardable"
_NOT_STATES = ("step",)  # a count per parameter group, which is saved with the groups


def save_optimizer_states_in_slices() -> None:
    """Make megatron-core's distributed optimizer save each rank's slice; a second call does nothing."""
    original = DistributedOptimizer.sharded_state_dict
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def sharded_state_dict(self: DistributedOptimizer, model_state: Any, is_loading: bool = False, *args: Any, **kwargs: Any) -> Any:
        if is_loading:
            return _without_missing_states(self, original(self, model_state, is_loading, *args, **kwargs))
        # Besides gathering, the original only collects garbage, for which training would wait a quarter of a second.
        return {**self.state_dict(), "param_state": dict(enumerate(state_shards(self, model_state))), "param_state_sharding_type": _FORMAT}

    DistributedOptimizer.sharded_state_dict = sharded_state_dict


def _without_missing_states(optimizer: DistributedOptimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state that is asked of a checkpoint, without the moments that a parameter does not have. megatron-core asks for two
    moments of every parameter, and a checkpoint has no second moment of Muon's matrices."""
    parameters = [parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map]
    for parameter, tensors in zip(parameters, state["param_state"].values(), strict=True):
        names = getattr(parameter, "optimizer_states", tensors)
        for name in tensors.keys() - {"param", *names}:
            del tensors[name]
    return state


def state_shards(optimizer: DistributedOptimizer, model_state: Any) -> Iterator[ShardedTensor]:
    """Yield this rank's slices of the fp32 weights and moments, if this rank is the first of the ranks that have them.

    Args:
        model_state: megatron-core's sharded state of the model, which holds the parameters themselves.
    """
    places = {place.data: place for place in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    for parameter, start, end in _slices(optimizer):
        assert parameter in places, f"a parameter of shape {tuple(parameter.shape)} is not in the model's state. {KEEP_VARS_HINT}"
        place = places[parameter]
        # The places are (pipeline, tensor, data). Data-parallel ranks have different slices, so only the first two numbers tell whether a
        # slice is a replica.
        if any(place.replica_id[:2]):
            continue
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        for part in place.build() if isinstance(place, ShardedTensorFactory) else [place]:
            for name, state in states.items():
                if name not in _NOT_STATES:
                    yield from _part_shards(part, parameter, f"optimizer.state.{name}.{part.key}", state.detach(), start, end)


def _slices(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Yield (parameter, first element, end) of each range of elements that this rank's optimizer updates."""
    for ranges_by_dtype in optimizer.gbuf_ranges:
        for buckets in ranges_by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _part_shards(
    part: ShardedTensor, parameter: torch.nn.Parameter, key: str, state: Tensor, start: int, end: int
) -> Iterator[ShardedTensor]:
    """Yield the elements ``start`` to ``end`` of a parameter, as far as they are in a part of it (the gate of a gated linear, for example).

    Args:
        part: a tensor whose ``data`` is a piece of the parameter's memory.
        state: [end - start].
    """
    assert part.data.is_contiguous(), f"{part.key} is stored in parts that are not contiguous in memory"
    assert state.numel() == end - start, f"{key} has {state.numel()} elements, its slice {end - start}"
    origin = part.data.storage_offset() - parameter.data.storage_offset()
    low, high = max(start, origin), min(end, origin + part.data.numel())
    if low >= high:
        return
    prepended = (1,) * part.prepend_axis_num
    for offset, sizes in boxes_of_range(low - origin, high - origin, part.local_shape):
        first = origin - start + _flat_index(offset, part.local_shape)
        box = state.view(-1)[first : first + math.prod(sizes)].view(prepended + sizes)
        place = tuple(a + b for a, b in zip(part.global_offset, (0,) * part.prepend_axis_num + offset, strict=True))
        # No fragmentations are given: these boxes are not a regular grid.
        yield ShardedTensor(key, box, box.dtype, tuple(box.shape), part.global_shape, place, None, replica_id=0)


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and sizes."""


def boxes_of_range(start: int, end: int, sizes: Sequence[int]) -> Iterator[Box]:
    """Yield boxes that hold the elements ``start`` to ``end`` of a tensor, counted row by row: consecutive elements each, in order."""
    if len(sizes) <= 1:
        yield ((start,), (end - start,)) if sizes else ((), ())
        return
    row = math.prod(sizes[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:
        yield from _boxes_in_row(first - 1, start, end, sizes)
        return
    if start < first * row:
        yield from _boxes_in_row(first - 1, start, first * row, sizes)
    if first < last:
        yield (first, *(0,) * (len(sizes) - 1)), (last - first, *sizes[1:])
    if last * row < end:
        yield from _boxes_in_row(last, last * row, end, sizes)


def _boxes_in_row(index: int, start: int, end: int, sizes: Sequence[int]) -> Iterator[Box]:
    begin = index * math.prod(sizes[1:])
    for offset, box in boxes_of_range(start - begin, end - begin, sizes[1:]):
        yield (index, *offset), (1, *box)


def _flat_index(offset: Sequence[int], sizes: Sequence[int]) -> int:
    index = 0
    for place, size in zip(offset, sizes, strict=True):
        index = index * size + place
    return index
