"""Checkpoints: sharded, complete or absent, hashed.

A save writes into ``checkpoints/.writing-step_X``: each rank writes its shards, hashed on the way (format/shard_files.py); rank 0 then
writes the index and the manifest, and makes all of it visible by one rename (commit.py). A process killed at any moment leaves either
the finished directory or a hidden one, which the next start removes. Training saves in the background (async_save.py) what is collected
here. Nothing in a checkpoint is code, and nothing that is read from one is executed (docs/security.md).

There is no random state to save: the noise is a function of the sample index (w1train.diffusion.philox), and the model
has no dropout.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from w1train.checkpoints.commit import raise_together, write_complete, write_hashed
from w1train.checkpoints.format.plain_values import first_unlike
from w1train.checkpoints.format.shard_files import write_index, write_part
from w1train.checkpoints.format.shard_loading import load_state
from w1train.checkpoints.format.shard_plan import LocalState, Plan, make_plan, tensors_of
from w1train.checkpoints.format.shard_reader import Shards
from w1train.checkpoints.manifest import (
    MANIFEST,
    WRITING,
    CheckpointError,
    Progress,
    complete_steps,
    damaged,
    is_complete,
    latest_step,
    read_config,
    read_progress,
    read_scores,
    require_manifests,
    step_path,
    verify_checkpoint,
)
from w1train.checkpoints.retention import best_steps, remove_old
from w1train.config.reading import shorten
from w1train.engine.building import TrainedModel
from w1train.engine.optimizers import make_states
from w1train.runtime.distributed import all_or_none, on_main_rank

logger = logging.getLogger(__name__)

# Others look for all that concerns checkpoints here.
__all__ = [
    "MANIFEST",
    "CheckpointError",
    "Progress",
    "best_steps",
    "collect_state",
    "complete_steps",
    "is_complete",
    "latest_step",
    "load_checkpoint",
    "load_model_weights",
    "read_config",
    "read_progress",
    "read_scores",
    "remove_old",
    "remove_unfinished",
    "require_manifests",
    "require_position",
    "save_checkpoint",
    "sharded_state",
    "step_path",
    "verify_checkpoint",
    "write_complete",
]


# "fully reshardable": optimizer state by parameter, so that a checkpoint loads under any other layout. megatron-core's
# default ("dp_reshardable") refuses a change of tensor or pipeline sizes.
_OPTIMIZER, _PROGRESS = "optimizer", "progress"
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True, "singleton_local_shards": False}


def save_checkpoint(
    directory: Path,
    model: TrainedModel,
    progress: Progress,
    config_yaml: str,
    *,
    keep: int,
    keep_best: int = 0,
    best_metric: str = "elbo",
    phase_start: int = 0,
    scores: Mapping[str, float] | None = None,
) -> Path:
    """Write ``directory/step_X``, here and now, and remove all but the ``keep`` newest and the ``keep_best`` best. Called on every rank.

    Args:
        best_metric: which of the scores says what is best.
        phase_start: the best are sought among later steps than this.
        scores: the validation of this very step by metric, if there was one; stored in the manifest.

    Raises:
        CheckpointError: on every rank if any failed to write; older checkpoints are untouched.
    """
    state = collect_state(model, progress)
    plan = make_plan(state)
    final = step_path(directory, progress.step)
    write_hashed(final, partial(write_shards, plan, state), progress, config_yaml, {"validation": dict(scores or {})})
    on_main_rank(partial(remove_old, directory, keep, keep_best, best_metric, phase_start))
    return final


def write_shards(plan: Plan, state: LocalState, writing: Path) -> Mapping[str, Any]:
    """Write every rank's part. Called on every rank.

    Returns:
        The manifest's entries of the files; on rank 0.

    Raises:
        CheckpointException: on every rank if any failed to write.
        OSError: on every rank if rank 0 could not write the index.
    """
    failure = None
    try:
        write_part(writing, dist.get_rank(), plan.boxes, tensors_of(plan, state.boxes), state.values)
    except OSError as error:
        failure = error
    raise_together(failure)
    return on_main_rank(lambda: write_index(writing, dist.get_world_size()))


def collect_state(model: TrainedModel, progress: Progress) -> LocalState:
    """What this rank has of model and optimizer: the tensors themselves, which the next step changes. Talks to no other rank."""
    state = sharded_state(model, is_loading=False)
    state[_PROGRESS] = _position(progress)
    shards, common = save_preprocess(state, validate_access_integrity=False)
    return LocalState.of(shards, common)


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed save left behind. Rank 0 only, while holding the run's lock."""
    for path in directory.glob(f"{WRITING}*"):
        logger.info("removing unfinished checkpoint %s", path)
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)


def load_checkpoint(path: Path, model: TrainedModel, *, verify: bool = True) -> Progress:
    """Load model and optimizer under whatever layout they are built in now. Called on every rank.

    Args:
        verify: compare the files with their hashes first; otherwise with their sizes alone.

    Raises:
        CheckpointError: a file is missing, short or changed.
    """
    progress = all_or_none(partial(read_progress, path))
    verify_checkpoint(path, rank=dist.get_rank(), num_ranks=dist.get_world_size(), hashes=verify)
    shards = all_or_none(partial(Shards, path))
    state = sharded_state(model, is_loading=True)
    values = all_or_none(partial(_values_of, shards, progress, state))
    # Each rank of a data- and context-parallel group reads its part of what all of them need and sends it to the others.
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    loaded = _unshare(load_state(state, shards, values, group), set())
    for index, stage in enumerate(model.stages):
        stage.load_state_dict(loaded[_model_key(index)], strict=True)
    model.optimizer.load_state_dict(loaded[_OPTIMIZER])
    return progress


def _values_of(shards: Shards, progress: Progress, state: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer's step counts and parameter groups.

    Raises:
        CheckpointError: they are not what this model's optimizer has, or the manifest is of another step.
    """
    values = shards.values()
    _require_position(shards.path, progress, values)
    _, expected = extract_sharded_base(state)
    if problem := first_unlike(expected.get(_OPTIMIZER, {}), values.get(_OPTIMIZER), _OPTIMIZER):
        raise damaged(shards.path, [problem])
    return {_OPTIMIZER: values[_OPTIMIZER]}


def _unshare(value: Any, seen: set[int]) -> Any:
    """Nested dicts and lists with no tensor in two places: what several chunks hold is read once, and the optimizer, which keeps
    the tensors it is given, would then update one state for all of them."""
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
    """Load the model alone (for sampling and evaluation). Called on every rank."""
    verify_checkpoint(path, rank=dist.get_rank(), num_ranks=dist.get_world_size())
    state = {_model_key(index): _model_state(stage) for index, stage in enumerate(stages)}
    loaded = load_state(state, all_or_none(partial(Shards, path)), {})
    for index, stage in enumerate(stages):
        stage.load_state_dict(loaded[_model_key(index)], strict=True)


def require_position(path: Path) -> None:
    """Compare the manifest's step with the one that is stored with the shards, which is read alone.

    Raises:
        CheckpointError: they differ.
    """
    _require_position(path, read_progress(path), Shards(path).values())


def _require_position(path: Path, progress: Progress, values: Mapping[str, Any]) -> None:
    if values.get(_PROGRESS) != _position(progress):
        raise damaged(path, [f"{MANIFEST} says {_position(progress)}, the shards say {shorten(values.get(_PROGRESS))}"])


def _position(progress: Progress) -> dict[str, int]:
    """The part that is saved with the shards, which must be the same on all ranks."""
    return {"step": progress.step, "samples": progress.samples}


def sharded_state(model: TrainedModel, *, is_loading: bool) -> dict[str, Any]:
    """megatron-core's sharded state of model and optimizer."""
    models = {_model_key(index): _model_state(stage) for index, stage in enumerate(model.stages)}
    # The optimizer finds its parameters' places through the model's state; with several stages it wants them all in one.
    model_state = models if len(models) > 1 else next(iter(models.values()))
    if not is_loading:
        make_states(model.optimizer)
    return {**models, _OPTIMIZER: model.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=_metadata())}


def _model_state(stage: torch.nn.Module) -> dict[str, Any]:
    state = stage.sharded_state_dict(metadata=_metadata())
    # "_extra_state" exists for FP8 alone; here it is an empty object per layer, thousands of files' worth of metadata.
    return {key: value for key, value in state.items() if not (isinstance(value, ShardedObject) and key.endswith("_extra_state"))}


def _metadata() -> dict[str, Any]:
    return {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _model_key(index: int) -> str:
    return "model" if index == 0 else f"model{index}"
