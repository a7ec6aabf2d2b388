"""Loading of a checkpoint's shards into megatron-core's sharded state, under any layout.

megatron-core says which boxes of which tensors a rank needs (its sharded state), and divides the reading among the ranks that need the same
boxes. All bytes are read by ``Shards``. megatron-core's own entry point, ``dist_checkpointing.load``, would unpickle files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8

from w1train.checkpoints.format.shard_reader import Shards
from w1train.checkpoints.manifest import CheckpointError, DamagedCheckpointError
from w1train.model.initialization import EXPERTS
from w1train.runtime.distributed import all_or_none


@dataclass(frozen=True, slots=True)
class Groups:
    """The ranks that need the same boxes."""

    dense: dist.ProcessGroup
    """The group of ranks that share all tensors except those of routed experts."""
    experts: dist.ProcessGroup
    """The group of ranks that have the same routed experts. In the other group, each rank would also receive the experts of all
    other ranks."""


def load_state(state: dict[str, Any], shards: Shards, values: dict[str, Any], groups: Groups | None = None) -> dict[str, Any]:
    """Fill a sharded state from a complete checkpoint. Every rank calls this.

    Args:
        values: the plain values of the state, from the checkpoint.
        groups: the ranks that need the same boxes: each reads a part of them and sends it to the others. None = each rank reads all its
            boxes.

    Returns:
        The values, and the state with tensors in the place of their descriptions.

    Raises:
        DamagedCheckpointError: on every rank; a shard cannot be read, or a tensor is missing or has other sizes than the model's.
    """
    force_all_tensors_to_non_fp8(state)
    wanted, loaded, factories = load_preprocess(state)
    merge(loaded, values)
    tensors, _ = extract_sharded_base(wanted)
    reader = _Reader(shards)
    if groups is None:
        merge(loaded, reader.load(tensors, shards.path))
    else:
        experts, others = extract_matching_values(tensors, lambda tensor: EXPERTS in tensor.key)
        for part, group in ((others, groups.dense), (experts, groups.experts)):
            merge(loaded, FullyParallelLoadStrategyWrapper(reader, group).load(part, shards.path))
    all_or_none(reader.raise_failure)
    return apply_factory_merges(loaded, factories)


class _Reader:
    """A reader of boxes, with the interface that megatron-core calls a load strategy."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._failure: CheckpointError | None = None

    def load(self, state: Any, _directory: Path, _async_strategy: str = "") -> Any:
        """Return the state with each tensor filled in."""
        return dict_list_map_outplace(self._filled, state)

    def _filled(self, wanted: Any) -> torch.Tensor:
        assert isinstance(wanted, ShardedTensor), type(wanted)
        wanted.init_data("cpu", init_fn=torch.empty)
        target = wanted.data.detach()
        try:
            if self._failure is None:
                self._fill(target.view((1,) * wanted.prepend_axis_num + tuple(wanted.local_shape)), wanted)
        except CheckpointError as error:
            # Raised after the ranks have exchanged what they read, because until then the other ranks wait for this rank.
            self._failure = error
        return target

    def _fill(self, target: torch.Tensor, wanted: ShardedTensor) -> None:
        stored = self._shards.tensors.get(wanted.key)
        if stored is None:
            raise DamagedCheckpointError(self._shards.path, [f"it has no {wanted.key}"])
        if stored.sizes != tuple(wanted.global_shape):
            sizes = f"the sizes {list(stored.sizes)}, the model {list(wanted.global_shape)}"
            raise DamagedCheckpointError(self._shards.path, [f"{wanted.key} has {sizes}"])
        num_read = self._shards.read_into(target, wanted.key, wanted.global_offset)
        assert num_read == target.numel(), f"{num_read} of {target.numel()} elements of {wanted.key} are stored"

    def raise_failure(self) -> None:
        """Raise the CheckpointError that this rank met, if any."""
        if self._failure is not None:
            raise self._failure
