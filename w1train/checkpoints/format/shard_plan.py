"""The plan of which rank writes which boxes of a checkpoint. It is made once for a run, whose saves all have the same tensors and boxes.

A tensor of the model is one entry of the checkpoint under its global name, whatever the layout (all layers of a pipeline stacked). A rank
holds boxes of it. If several ranks hold the same box, the rank with the fewest bytes so far writes it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from w1train.checkpoints.format.shard_index import encode_values


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a tensor of the checkpoint."""

    key: str
    global_sizes: tuple[int, ...]
    dtype: torch.dtype
    offset: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the box's elements."""
        return math.prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Plan:
    """A rank's part of every save."""

    boxes: tuple[Box, ...]
    """The boxes that this rank writes, in this order."""
    num_held: int
    """The number of boxes that this rank held when the plan was made, including those that other ranks write."""


@dataclass(frozen=True, slots=True)
class LocalState:
    """The part of the state that a rank holds at a step."""

    boxes: dict[Box, Tensor]
    values: dict[str, Any]
    """Plain values of the state, as JSON; on rank 0. They are copies of the step's values, which change."""

    @classmethod
    def of(cls, state: Any, values: dict[str, Any]) -> LocalState:
        """Take megatron-core's sharded state after its factories were applied. Of replicas on tensor- and pipeline-parallel ranks only the
        first counts. All replicas on data-parallel ranks count, and the plan chooses among them."""
        boxes: dict[Box, Tensor] = {}
        for value in nested_values(state):
            assert isinstance(value, ShardedTensor), type(value)
            if _is_first_of_model_parallel(value.replica_id):
                # Several chunks of a virtual pipeline may hold the same box.
                boxes.setdefault(_box(value), value.data.detach().view((1,) * value.prepend_axis_num + tuple(value.local_shape)))
        return cls(boxes, encode_values(values) if dist.get_rank() == 0 else {})


def _is_first_of_model_parallel(replica: int | tuple[int, ...]) -> bool:
    """Tell whether a replica is the first over model-parallel ranks. A tuple is (pipeline, tensor, data); a lone number counts
    data-parallel ranks."""
    return isinstance(replica, int) or not any(replica[:-1])


def _box(shard: ShardedTensor) -> Box:
    sizes = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return Box(shard.key, tuple(shard.global_shape), shard.dtype, tuple(shard.global_offset), sizes)


def make_plan(state: LocalState) -> Plan:
    """Make the plan of all ranks, and return this rank's part. Every rank calls this."""
    held: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(list(state.boxes), held)
    dealt: list[Any] = [None] * dist.get_world_size()
    if held is not None:
        parts = deal(held)
        require_whole(box for part in parts for box in part)
        # Positions in each rank's own list, which take less to send than boxes.
        numbers = [{box: number for number, box in enumerate(boxes)} for boxes in held]
        dealt = [[number[box] for box in part] for number, part in zip(numbers, parts, strict=True)]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, dealt if held is not None else None)
    own = list(state.boxes)
    return Plan(tuple(own[number] for number in mine[0]), len(own))


def deal(held: Sequence[Sequence[Box]]) -> list[list[Box]]:
    """Give each box to one of the ranks that hold it: the largest boxes first, each to the rank with the fewest bytes so far.

    Args:
        held: the boxes that each rank holds.

    Returns:
        The boxes that each rank writes.
    """
    holders: dict[Box, list[int]] = defaultdict(list)
    for rank, boxes in enumerate(held):
        for box in boxes:
            holders[box].append(rank)
    # Boxes that only one rank holds come first: there is no choice for them, and the choices for other boxes take their bytes into account.
    order = sorted(holders, key=lambda box: (len(holders[box]) > 1, -box.num_bytes, box.key, box.offset))
    loads = [0] * len(held)
    parts: list[list[Box]] = [[] for _ in held]
    for box in order:
        rank = min(holders[box], key=lambda rank: (loads[rank], rank))
        loads[rank] += box.num_bytes
        parts[rank].append(box)
    return parts


def require_whole(boxes: Iterable[Box]) -> None:
    """Assert that boxes together are whole tensors. This is called when the plan is made, so that a mistake is found at the first step and
    not at the first save."""
    by_key: dict[str, list[Box]] = defaultdict(list)
    for box in boxes:
        by_key[box.key].append(box)
    for key, parts in by_key.items():
        first = parts[0]
        assert all((box.global_sizes, box.dtype) == (first.global_sizes, first.dtype) for box in parts), f"ranks disagree on {key}"
        volume = sum(math.prod(box.sizes) for box in parts)
        assert volume == math.prod(first.global_sizes), f"{key}: {volume} elements are held, of {first.global_sizes}"


def tensors_of(plan: Plan, state: Mapping[Box, Tensor]) -> list[Tensor]:
    """Return the tensors of a plan's boxes at a later step."""
    missing = [box for box in plan.boxes if box not in state]
    assert not missing, f"the state has changed since its first save: {missing[0]} is missing"
    # Boxes that are not in the plan would silently not be saved.
    assert len(state) == plan.num_held, f"the state has changed since its first save: {len(state)} boxes, {plan.num_held} were planned"
    return [state[box] for box in plan.boxes]
