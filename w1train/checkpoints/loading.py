"""Loading of a checkpoint into a model and its optimizer, under whatever layout these are built in now.

Nothing in a checkpoint is code, and nothing that is read from it is executed (docs/security.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from w1train.checkpoints.format.plain_values import first_unlike
from w1train.checkpoints.format.shard_loading import Groups, load_state
from w1train.checkpoints.format.shard_reader import Shards
from w1train.checkpoints.manifest import MANIFEST, DamagedCheckpointError, Progress, read_progress
from w1train.checkpoints.model_state import OPTIMIZER, PROGRESS, model_key, position, sharded_model, sharded_state
from w1train.checkpoints.verification import verify_checkpoint
from w1train.config.reading import shorten
from w1train.engine.building import TrainedModel
from w1train.runtime.distributed import all_or_none


def load_checkpoint(path: Path, model: TrainedModel, *, verify: bool = True) -> Progress:
    """Load model and optimizer, and return the progress. Every rank calls this.

    Args:
        verify: compare the files with their hashes first; False compares only their sizes.

    Raises:
        DamagedCheckpointError: on every rank; a file is missing, too short or changed, or holds another optimizer's state.
    """
    progress = all_or_none(partial(read_progress, path))
    verify_checkpoint(path, rank=dist.get_rank(), num_ranks=dist.get_world_size(), hashes=verify)
    shards = all_or_none(partial(Shards, path))
    state = sharded_state(model, is_loading=True)
    values = all_or_none(partial(_values_of, shards, progress, state))
    # Each rank of a data- and context-parallel group reads a part of the boxes that all of these ranks need, and sends it to the other
    # ranks.
    groups = Groups(parallel_state.get_data_parallel_group(with_context_parallel=True), parallel_state.get_expert_data_parallel_group())
    loaded = _unshare(load_state(state, shards, values, groups), set())
    for index, stage in enumerate(model.stages):
        stage.load_state_dict(loaded[model_key(index)], strict=True)
    model.optimizer.load_state_dict(loaded[OPTIMIZER])
    return progress


def _values_of(shards: Shards, progress: Progress, state: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer's step counts and parameter groups.

    Raises:
        DamagedCheckpointError: they are not what this model's optimizer has, or the manifest is of another step.
    """
    values = shards.values()
    _require_position(shards.path, progress, values)
    _, expected = extract_sharded_base(state)
    if problem := first_unlike(expected.get(OPTIMIZER, {}), values.get(OPTIMIZER), OPTIMIZER):
        raise DamagedCheckpointError(shards.path, [problem])
    return {OPTIMIZER: values[OPTIMIZER]}


def _unshare(value: Any, seen: set[int]) -> Any:
    """Copy nested dicts and lists so that no tensor is in two places. A tensor that several chunks hold is read once. The optimizer keeps
    the tensors that it is given, and would then update one state for all of these chunks."""
    if isinstance(value, dict):
        return {key: _unshare(item, seen) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshare(item, seen) for item in value]
    if isinstance(value, torch.Tensor):
        if id(value) in seen:
            return value.clone()
        seen.add(id(value))
    return value


def load_model_weights(path: Path, stages: list[torch.nn.Module]) -> None:
    """Load the model without its optimizer, for sampling and evaluation. Every rank calls this.

    Raises:
        DamagedCheckpointError: on every rank; a file is missing, too short or changed.
    """
    verify_checkpoint(path, rank=dist.get_rank(), num_ranks=dist.get_world_size())
    state = {model_key(index): sharded_model(stage) for index, stage in enumerate(stages)}
    loaded = load_state(state, all_or_none(partial(Shards, path)), {})
    for index, stage in enumerate(stages):
        stage.load_state_dict(loaded[model_key(index)], strict=True)


def require_position(path: Path) -> None:
    """Compare the manifest's step with the step that is stored with the shards. Read only these two values, and no tensor.

    Raises:
        DamagedCheckpointError: they differ.
    """
    _require_position(path, read_progress(path), Shards(path).values())


def _require_position(path: Path, progress: Progress, values: Mapping[str, Any]) -> None:
    if values.get(PROGRESS) != position(progress):
        raise DamagedCheckpointError(path, [f"{MANIFEST} says {position(progress)}, the shards say {shorten(values.get(PROGRESS))}"])
