"""The state that a checkpoint holds: megatron-core's sharded state of model and optimizer, and the position in the data.

Random state is not part of it: the noise is a function of the sample index (w1train.diffusion.philox), and the model has no dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from w1train.checkpoints.format.shard_plan import LocalState
from w1train.checkpoints.manifest import Progress
from w1train.engine.building import TrainedModel
from w1train.engine.optimizers import make_states

OPTIMIZER, PROGRESS = "optimizer", "progress"
"""Keys of the sharded state, beside those of ``model_key``."""
# "fully reshardable": optimizer state by parameter, so that a checkpoint loads under any other layout. megatron-core's
# default ("dp_reshardable") refuses a change of tensor or pipeline sizes.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True, "singleton_local_shards": False}


def collect_state(model: TrainedModel, progress: Progress) -> LocalState:
    """Return what this rank holds of model and optimizer: the tensors themselves, which the next step changes. This does not communicate
    with other ranks."""
    state = sharded_state(model, is_loading=False)
    state[PROGRESS] = position(progress)
    shards, common = save_preprocess(state, validate_access_integrity=False)
    return LocalState.of(shards, common)


def position(progress: Progress) -> dict[str, int]:
    """Return the part of the progress that is saved with the shards, which must be the same on all ranks."""
    return {"step": progress.step, "samples": progress.samples}


def sharded_state(model: TrainedModel, *, is_loading: bool) -> dict[str, Any]:
    """Return megatron-core's sharded state of model and optimizer."""
    models = {model_key(index): sharded_model(stage) for index, stage in enumerate(model.stages)}
    # The optimizer finds the places of its parameters through the model's state. With several stages it needs the states of all of them in
    # one dictionary.
    model_state = models if len(models) > 1 else next(iter(models.values()))
    make_states(model.optimizer)
    return {**models, OPTIMIZER: model.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=_metadata())}


def sharded_model(stage: torch.nn.Module) -> dict[str, Any]:
    """Return megatron-core's sharded state of one stage of the model."""
    state = stage.sharded_state_dict(metadata=_metadata())
    # "_extra_state" exists only for FP8. Here it is an empty object for each layer, whose metadata would be as large as those of thousands
    # of files.
    return {key: value for key, value in state.items() if not (isinstance(value, ShardedObject) and key.endswith("_extra_state"))}


def model_key(index: int) -> str:
    """Return the key of a stage of the model in the sharded state."""
    return "model" if index == 0 else f"model{index}"


def _metadata() -> dict[str, Any]:
    return {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
