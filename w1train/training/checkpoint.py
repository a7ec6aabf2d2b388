"""Checkpoints: sharded, complete or absent, hashed.

A save writes into ``checkpoints/.writing-step_X`` through megatron-core's sharded state and torch's distributed
checkpoint; each rank hashes its own files; rank 0 writes the manifest and makes all of it visible by one rename. A process
killed at any moment leaves either the finished directory or a hidden one, which the next start removes.

There is no random state to save: the noise is a function of the sample index (w1train.diffusion.philox), and the model
has no dropout.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_distributed

from w1train.runtime.files import sync_directory, write_text
from w1train.training.setup import TrainedModel

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_STEP_DIRECTORY = re.compile(r"step_(\d{10})$")
_WRITING = ".writing-"
_HASH_CHUNK = 1 << 24

# "fully reshardable": optimizer state by parameter, so that a checkpoint loads under any other layout. megatron-core's
# default ("dp_reshardable") refuses a change of tensor or pipeline sizes.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True, "singleton_local_shards": False}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, and what is still good."""


@dataclass(slots=True)
class Progress:
    """How far the run is; with the configuration, all that a resume needs besides tensors."""

    step: int = 0
    samples: int = 0


class _SaveStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's format through torch's own writer.

    megatron-core's synchronous save goes through its asynchronous writer, which spawns a process that imports torch and
    megatron again: seconds of CPU per save, for a queue.
    """

    def save(self, sharded_state_dict: dict, checkpoint_dir: Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)
        save_distributed(
            mcore_to_pyt_state_dict(state, False), storage_writer=FileSystemWriter(checkpoint_dir, sync_files=True), planner=planner
        )


def save_checkpoint(directory: Path, model: TrainedModel, progress: Progress, config_yaml: str, *, keep: int) -> Path:
    """Write ``directory/step_X`` and remove all but the ``keep`` newest. Called on every rank.

    Raises:
        CheckpointError: on every rank if any failed to write; older checkpoints are untouched.
    """
    final = directory / f"step_{progress.step:010d}"
    writing = directory / f"{_WRITING}{final.name}"
    if dist.get_rank() == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    dist.barrier()
    error = _attempt_save(writing, model, progress, config_yaml)
    errors = [message for message in _gather(error) if message]
    if errors:
        if dist.get_rank() == 0:
            shutil.rmtree(writing, ignore_errors=True)
        kept = latest_step(directory)
        raise CheckpointError(
            f"could not save {final}: {errors[0]}. "
            + (f"The checkpoint of step {kept} is untouched; running the same command again resumes from it." if kept is not None else "")
        )
    if dist.get_rank() == 0:
        _commit(writing, final)
        _remove_old(directory, keep)
    dist.barrier()
    return final


def _attempt_save(writing: Path, model: TrainedModel, progress: Progress, config_yaml: str) -> str | None:
    """Write this rank's part; the error's text instead of the error, so that all ranks can fail together."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    try:
        state = sharded_state(model, is_loading=False)
        state["progress"] = {"step": progress.step, "samples": progress.samples}
        dist_checkpointing.save(state, str(writing), FullyParallelSaveStrategyWrapper(_SaveStrategy(), group))
        files = _hash_files(path for path in writing.iterdir() if path.name.startswith(f"__{dist.get_rank()}_"))
    except (OSError, dist_checkpointing.core.CheckpointingException, torch.distributed.checkpoint.CheckpointException) as error:
        # torch's CheckpointException wraps what a rank met, a full disk say; its text names rank and cause.
        return f"{type(error).__name__}: {_root_cause(error)}"
    all_files: dict[str, Any] = {}
    for part in _gather(files):
        all_files.update(part)
    if dist.get_rank() == 0:
        try:
            _write_manifest(writing, all_files, progress, config_yaml)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
    return None


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in failures.items()) if failures else str(error)


def _write_manifest(writing: Path, files: dict[str, Any], progress: Progress, config_yaml: str) -> None:
    write_text(writing / "config.yaml", config_yaml)
    files.update(_hash_files(path for path in writing.iterdir() if path.name not in files))
    manifest = {"step": progress.step, "samples": progress.samples, "world_size": dist.get_world_size(), "files": files}
    write_text(writing / MANIFEST, json.dumps(manifest, indent=1))


def _commit(writing: Path, final: Path) -> None:
    if final.exists():
        shutil.rmtree(final)
    os.rename(writing, final)
    sync_directory(final.parent)


def _remove_old(directory: Path, keep: int) -> None:
    for step in complete_steps(directory)[:-keep]:
        logger.info("removing checkpoint of step %d (checkpoint.keep=%d)", step, keep)
        # Hidden first: a half-deleted directory must not look complete.
        path = directory / f"step_{step:010d}"
        hidden = directory / f"{_WRITING}removing-{path.name}"
        os.rename(path, hidden)
        shutil.rmtree(hidden)


def complete_steps(directory: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    if not directory.is_dir():
        return []
    matches = (_STEP_DIRECTORY.fullmatch(path.name) for path in directory.iterdir() if (path / MANIFEST).is_file())
    return sorted(int(match.group(1)) for match in matches if match)


def latest_step(directory: Path) -> int | None:
    """The newest complete checkpoint's step."""
    steps = complete_steps(directory)
    return steps[-1] if steps else None


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed save left behind. Rank 0 only, while holding the run's lock."""
    for path in directory.glob(f"{_WRITING}*"):
        logger.info("removing unfinished checkpoint %s", path)
        shutil.rmtree(path)


def load_checkpoint(path: Path, model: TrainedModel) -> Progress:
    """Load model and optimizer under whatever layout they are built in now. Called on every rank.

    Raises:
        CheckpointError: a file is missing, short or changed.
    """
    verify_checkpoint(path, rank=dist.get_rank(), num_ranks=dist.get_world_size())
    state = sharded_state(model, is_loading=True)
    state["progress"] = {}
    loaded = dist_checkpointing.load(state, str(path))
    for index, stage in enumerate(model.stages):
        stage.load_state_dict(loaded[_model_key(index)], strict=True)
    model.optimizer.load_state_dict(loaded["optimizer"])
    return read_progress(path)


def load_model_weights(path: Path, stages: list[torch.nn.Module]) -> None:
    """Load the model alone (for sampling and evaluation). Called on every rank."""
    verify_checkpoint(path, rank=dist.get_rank(), num_ranks=dist.get_world_size())
    state = {_model_key(index): _model_state(stage) for index, stage in enumerate(stages)}
    loaded = dist_checkpointing.load(state, str(path))
    for index, stage in enumerate(stages):
        stage.load_state_dict(loaded[_model_key(index)], strict=True)


def read_progress(path: Path) -> Progress:
    """Step and samples of a complete checkpoint."""
    manifest = json.loads((path / MANIFEST).read_text())
    return Progress(step=manifest["step"], samples=manifest["samples"])


def sharded_state(model: TrainedModel, *, is_loading: bool) -> dict[str, Any]:
    """megatron-core's sharded state of model and optimizer."""
    models = {_model_key(index): _model_state(stage) for index, stage in enumerate(model.stages)}
    # The optimizer finds its parameters' places through the model's state; with several stages it wants them all in one.
    model_state = models if len(models) > 1 else next(iter(models.values()))
    return {**models, "optimizer": model.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=_metadata())}


def _model_state(stage: torch.nn.Module) -> dict[str, Any]:
    state = stage.sharded_state_dict(metadata=_metadata())
    # "_extra_state" exists for FP8 alone; here it is an empty object per layer, thousands of files' worth of metadata.
    return {key: value for key, value in state.items() if not (isinstance(value, ShardedObject) and key.endswith("_extra_state"))}


def _metadata() -> dict[str, Any]:
    return {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _model_key(index: int) -> str:
    return "model" if index == 0 else f"model{index}"


def verify_checkpoint(path: Path, *, rank: int = 0, num_ranks: int = 1) -> None:
    """Compare every ``num_ranks``-th file with the manifest's sizes and hashes; all ranks together cover all files.

    Raises:
        CheckpointError: on every rank, naming the files.
    """
    problems = []
    files = sorted(json.loads((path / MANIFEST).read_text())["files"].items())
    for name, expected in files[rank::num_ranks]:
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != expected["size"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, expected {expected['size']}")
        elif _sha256(file) != expected["sha256"]:
            problems.append(f"{name} has changed (SHA-256 differs)")
    if num_ranks > 1:
        problems = [problem for part in _gather(problems) for problem in part]
    if problems:
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}. Remove this directory to resume from an older checkpoint.")


def _hash_files(paths: Any) -> dict[str, Any]:
    return {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _gather(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
