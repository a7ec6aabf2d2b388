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
import math
import os
import re
import shutil
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper, FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint import save as save_distributed

from w1train.config.schema import Config
from w1train.config.serialization import config_from_yaml
from w1train.runtime.distributed import agreed, all_or_none, on_every_rank, on_main_rank
from w1train.runtime.files import sync_directory, write_text
from w1train.training.setup import TrainedModel

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_STEP_DIRECTORY = re.compile(r"step_\d{10}")
_WRITING = ".writing-"

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
    seconds: float = 0.0
    """Wall time up to here over all starts of the run; work that a kill undid is not in it."""
    dataset: str | None = None
    """SHA-256 of the training tokens: ``samples`` is a place in the order of these. None for a foreign dataset, which has none."""
    health: dict[str, Any] = field(default_factory=dict)
    """What the guard of the steps (w1train.training.health.guard) goes by: JSON. Checkpoints of before it have none."""


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
    """Write ``directory/step_X`` and remove all but the ``keep`` newest and the ``keep_best`` best. Called on every rank.

    Args:
        best_metric: which of the scores says what is best.
        phase_start: the best are sought among later steps than this.
        scores: the validation of this very step by metric, if there was one; stored in the manifest.

    Raises:
        CheckpointError: on every rank if any failed to write; older checkpoints are untouched.
    """
    final = step_path(directory, progress.step)
    write_complete(final, partial(_write_shards, model=model, progress=progress), progress, config_yaml, {"validation": dict(scores or {})})
    on_main_rank(partial(remove_old, directory, keep, keep_best, best_metric, phase_start))
    return final


def step_path(directory: Path, step: int) -> Path:
    """The checkpoint of a step, there or not."""
    return directory / f"step_{step:010d}"


def write_complete(
    final: Path, write_shards: Callable[[Path], None], progress: Progress, config_yaml: str, remarks: Mapping[str, Any]
) -> None:
    """What makes shards a checkpoint: written aside, hashed, a manifest (with ``remarks`` added), one rename. Called on every rank.

    Args:
        write_shards: writes torch's distributed files into the directory it is given; rank r's are called ``__r_*``.

    Raises:
        CheckpointError: on every rank if any failed to write; nothing is left of it.
    """
    writing = final.parent / f"{_WRITING}{final.name}"
    try:
        on_main_rank(partial(_make_empty, writing))
        write_shards(writing)
        files = on_every_rank(lambda: _hash_files(path for path in writing.iterdir() if path.name.startswith(f"__{dist.get_rank()}_")))
        on_main_rank(lambda: _write_manifest(writing, dict(ChainMap(*files)), progress, config_yaml, remarks))
        on_main_rank(partial(_commit, writing, final))
    except (OSError, CheckpointException) as error:
        raise agreed(CheckpointError(on_main_rank(partial(_explain_failure, final, writing, error)))) from error


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _write_shards(writing: Path, model: TrainedModel, progress: Progress) -> None:
    """Each rank its part, as megatron-core's ``dist_checkpointing.save`` does, but for the file that rank 0 writes there between
    two collectives: when the disk is full, the other ranks would wait for rank 0 for ever.

    Raises:
        CheckpointException: on every rank; torch's, with what went wrong by rank.
    """
    state = sharded_state(model, is_loading=False)
    state["progress"] = _position(progress)
    shards, common = save_preprocess(state)
    shards = _once_per_rank(shards)
    shards["common_state"] = ShardedObject("common_state", common, global_shape=(1,), global_offset=(0,), replica_id=dist.get_rank())
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    FullyParallelSaveStrategyWrapper(_SaveStrategy(), group).save(shards, writing)


def _once_per_rank(shards: dict[str, Any]) -> dict[str, Any]:
    """Each shard once, as its lowest replica: every chunk of a virtual pipeline holds the timestep embedding, and megatron-core,
    which deals replicas out to ranks by their keys, would make all copies of the chosen rank its main one."""
    owners: dict[tuple, ShardedTensor] = {}
    for shard in nested_values(shards):
        if isinstance(shard, ShardedTensor):
            place = (shard.key, shard.global_offset)
            owners[place] = min(owners.get(place, shard), shard, key=lambda replica: replica.replica_id)
    kept, _ = extract_matching_values(
        shards, lambda shard: not isinstance(shard, ShardedTensor) or owners[shard.key, shard.global_offset] is shard
    )
    return kept


def _explain_failure(final: Path, writing: Path, error: BaseException) -> str:
    """What went wrong and what is left, once the half-written files (which may be what fills the disk) are gone."""
    free = shutil.disk_usage(final.parent).free
    shutil.rmtree(writing, ignore_errors=True)
    kept = latest_step(final.parent)
    older = "There is no older one" if kept is None else f"The one of step {kept} is untouched: the same command goes on from it"
    return f"could not save {final}, with {free / 2**20:.1f} MiB free on that disk: {'; '.join(_root_causes(error))}. {older}."


def _root_causes(error: BaseException) -> list[str]:
    """One line for every rank that failed, without the tracebacks that torch puts into its text."""
    if isinstance(error, CheckpointException):
        return [f"rank {rank}: {_first_line(cause)}" for rank, (cause, _) in sorted(error.failures.items())]
    return [_first_line(error)]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    if "inline_container" in text:
        # What torch's writer makes of a full disk, now and then: a wrong position in its archive.
        return f"a file could not be written to its end (disk full, or a quota or file size limit reached; torch says: {text})"
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def _write_manifest(writing: Path, files: dict[str, Any], progress: Progress, config_yaml: str, remarks: Mapping[str, Any]) -> None:
    save_config(CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1), str(writing))
    write_text(writing / "config.yaml", config_yaml)
    files.update(_hash_files(path for path in writing.iterdir() if path.name not in files))
    manifest = {**asdict(progress), "world_size": dist.get_world_size(), **remarks, "files": files}
    write_text(writing / MANIFEST, json.dumps(manifest, indent=1))


def _commit(writing: Path, final: Path) -> None:
    os.rename(writing, final)
    sync_directory(final.parent)


def remove_old(directory: Path, keep: int, keep_best: int, best_metric: str, phase_start: int = 0) -> None:
    """Remove what is neither among the newest nor among the best. Rank 0 only.

    What stays follows from the scores of all checkpoints so far, not from when this was called: a kill between a save and the
    removal changes nothing.
    """
    steps = complete_steps(directory)
    kept = {*steps[-keep:], *best_steps(directory, keep_best, best_metric, after=phase_start)}
    for step in [step for step in steps if step not in kept]:
        logger.info("removing checkpoint of step %d (checkpoint.keep=%d, checkpoint.keep_best=%d)", step, keep, keep_best)
        path = step_path(directory, step)
        hidden = directory / f"{_WRITING}removing-{path.name}"
        try:
            # Hidden first: a half-deleted directory must not look complete.
            os.rename(path, hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            logger.warning("could not remove checkpoint %s: %s. Training goes on; the next start removes the rest", path, error)


def best_steps(directory: Path, count: int, metric: str, *, after: int = 0) -> list[int]:
    """The steps of the ``count`` best checkpoints (fewer if there are not as many with a score), the best first; of equals the newer.

    Args:
        after: only later steps than this; of a phase, whose scores another phase's do not compare with.
    """
    if count == 0:
        return []
    scores = {step: _score(step_path(directory, step), metric) for step in complete_steps(directory) if step > after}
    ranked = sorted((score, -step) for step, score in scores.items() if score is not None)
    return [-negative for _, negative in ranked[:count]]


def _score(path: Path, metric: str) -> float | None:
    try:
        score = read_scores(path).get(metric)
    except CheckpointError as error:
        logger.warning("%s counts as one without a score", error)
        return None
    return score if score is not None and math.isfinite(score) else None


def read_scores(path: Path) -> dict[str, float]:
    """The validation at a complete checkpoint's step, by metric; empty if there was none."""
    return _read_manifest(path).get("validation", {})


def complete_steps(directory: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    return sorted(int(path.name.removeprefix("step_")) for path in _step_directories(directory) if is_complete(path))


def is_complete(path: Path) -> bool:
    """Directories get their name when they are complete: the manifest's absence means damage."""
    return (path / MANIFEST).is_file()


def _step_directories(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if _STEP_DIRECTORY.fullmatch(path.name)] if directory.is_dir() else []


def require_manifests(directory: Path) -> None:
    """Directories get their final name when they are complete, so one without manifest is damaged; going on from an older one
    without a word would undo training.

    Raises:
        CheckpointError: naming it.
    """
    for path in _step_directories(directory):
        if not is_complete(path):
            raise _damaged(path, [f"{MANIFEST} is missing"])


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
    progress = all_or_none(partial(read_progress, path))
    verify_checkpoint(path, rank=dist.get_rank(), num_ranks=dist.get_world_size())
    state = sharded_state(model, is_loading=True)
    state["progress"] = {}
    loaded = _read_shards(state, path)
    if loaded["progress"] != _position(progress):
        raise agreed(_damaged(path, [f"{MANIFEST} says {_position(progress)}, the shards say {loaded['progress']}"]))
    for index, stage in enumerate(model.stages):
        stage.load_state_dict(loaded[_model_key(index)], strict=True)
    model.optimizer.load_state_dict(loaded["optimizer"])
    return progress


def _read_shards(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Each rank of a data- and context-parallel group reads its part of what all of them need and sends it to the others."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    loaded = dist_checkpointing.load(state, str(path), FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group))
    return _unshare(loaded, set())


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
    loaded = dist_checkpointing.load(state, str(path))
    for index, stage in enumerate(stages):
        stage.load_state_dict(loaded[_model_key(index)], strict=True)


def read_progress(path: Path) -> Progress:
    """How far the run was at a complete checkpoint.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    manifest = _read_manifest(path)
    return Progress(**{field.name: manifest[field.name] for field in fields(Progress)})


def _position(progress: Progress) -> dict[str, int]:
    """The part that is saved with the shards, which must be the same on all ranks."""
    return {"step": progress.step, "samples": progress.samples}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = {"health": {}, **json.loads((path / MANIFEST).read_bytes())}
        missing = {*(field.name for field in fields(Progress)), "files"} - manifest.keys()
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, [f"{MANIFEST} cannot be read ({error})"]) from error
    if missing:
        raise _damaged(path, [f"{MANIFEST} lacks {', '.join(sorted(missing))}"])
    return manifest


def _damaged(path: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {'; '.join(problems)}. Remove this directory to resume from an older checkpoint.")


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

    def problems_here() -> list[str]:
        files = sorted(_read_manifest(path)["files"].items())
        return [problem for name, expected in files[rank::num_ranks] for problem in _file_problems(path / name, expected)]

    problems = [problem for part in on_every_rank(problems_here) for problem in part] if num_ranks > 1 else problems_here()
    if problems:
        error = _damaged(path, problems)
        raise agreed(error) if num_ranks > 1 else error


def read_config(path: Path) -> Config:
    """The configuration that a complete checkpoint was trained with, which its manifest vouches for.

    Raises:
        CheckpointError: the file is missing or changed.
    """
    expected = _read_manifest(path)["files"].get("config.yaml")
    problems = [f"{MANIFEST} lacks config.yaml"] if expected is None else _file_problems(path / "config.yaml", expected)
    if problems:
        raise _damaged(path, problems)
    return config_from_yaml(path / "config.yaml")


def _file_problems(file: Path, expected: dict[str, Any]) -> list[str]:
    """What is wrong with a file whose size and hash are known; at most one thing."""
    if not file.is_file():
        return [f"{file.name} is missing"]
    if file.stat().st_size != expected["size"]:
        return [f"{file.name} has {file.stat().st_size} bytes, expected {expected['size']}"]
    if _sha256(file) != expected["sha256"]:
        return [f"{file.name} has changed (SHA-256 differs)"]
    return []


def _hash_files(paths: Any) -> dict[str, Any]:
    return {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
