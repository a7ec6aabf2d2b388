"""Predicted bytes of parameters, gradients and optimizer states, compared to the byte with a real run's storages."""

import math

import pytest

from tests.distributed import run_distributed
from tests.slow import slow_except
from tests.tiny import packed_batch, tiny_config, tiny_experts
from w1train.planning.layout import chunks_of, layout_of
from w1train.planning.parameters import Parameter, chunk_parameters
from w1train.planning.state import buffer_layout, shard_numels, stage_state_bytes
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine import buckets  # noqa: E402
from w1train.engine.building import build_trained_model  # noqa: E402
from w1train.model.initialization import global_named_parameters  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.forward import run_micro_batches  # noqa: E402

TIED = {"qk_norm": True, "qkv_bias": True, "tie_embeddings": True, "num_query_groups": 2}
EXPERTS = tiny_experts()
# World size, layout, precision, model.
CASES = {
    "data 3, fp32": (3, {}, "fp32", {}),
    "data 3, bf16, tied": (3, {}, "bf16", TIED),
    "one rank, plain optimizer, bf16": (1, {"distributed_optimizer": False}, "bf16", {}),
    "tensor 2, sequence, data 2, bf16": (4, {"tensor": 2, "sequence": True}, "bf16", {"conditioning": "none"}),
    "tensor 2, pipeline 2, data 2, fp32": (8, {"tensor": 2, "pipeline": 2}, "fp32", {}),
    "pipeline 2, data 3, bf16": (6, {"pipeline": 2}, "bf16", {}),
    "pipeline 2, data 2, bf16, tied": (4, {"pipeline": 2}, "bf16", TIED),
    "pipeline 2, plain optimizer, data 2, fp32": (4, {"pipeline": 2, "distributed_optimizer": False}, "fp32", TIED),
    "data 3, overlap, bf16": (3, {"overlap_grad_reduce": True, "overlap_param_gather": True}, "bf16", {}),
    "pipeline 2, data 2, overlap, fp32": (4, {"pipeline": 2, "overlap_grad_reduce": True}, "fp32", {}),
    "pipeline 2, virtual 2, data 2, bf16, tied": (4, {"pipeline": 2, "virtual_pipeline": 2}, "bf16", TIED),
    "context 2, tensor 2, bf16": (4, {"context": 2, "context_chunk_size": 8, "tensor": 2}, "bf16", {}),
    "tensor 2, data 2, overlap, bf16, Muon": (4, {"tensor": 2, "overlap_grad_reduce": True}, "bf16", {}),
    "one rank, plain optimizer, bf16, Muon": (1, {"distributed_optimizer": False}, "bf16", {}),
    "tensor 2, data 2, bf16, adapters": (4, {"tensor": 2}, "bf16", {"qkv_bias": True}),
    "expert 2, pipeline 2, plain optimizer, bf16, adapters": (
        4,
        {"expert": 2, "pipeline": 2, "distributed_optimizer": False},
        "bf16",
        EXPERTS,
    ),
    "expert 2, data 4, bf16": (4, {"expert": 2}, "bf16", EXPERTS),
    "expert 2, one tensor rank of two an expert, overlap, bf16": (
        4,
        {"tensor": 2, "sequence": True, "expert": 2, "overlap_grad_reduce": True},
        "bf16",
        EXPERTS,
    ),
    "expert 2, expert tensor 2, tensor 2, data 2, fp32": (
        4,
        {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2},
        "fp32",
        EXPERTS,
    ),
    "expert 4, context 2, pipeline 2, data 2, bf16": (
        8,
        {"context": 2, "context_chunk_size": 8, "pipeline": 2, "expert": 4},
        "bf16",
        EXPERTS,
    ),
    "expert 2, plain optimizer, data 2, bf16": (2, {"expert": 2, "distributed_optimizer": False}, "bf16", EXPERTS),
    "pipeline 2, uneven, context 2, fp32": (
        4,
        {"pipeline": 2, "num_layers_in_first_stage": 1, "context": 2, "context_chunk_size": 8},
        "fp32",
        {},
    ),
}


def _storage_bytes(tensors):
    """Return the bytes of the distinct storages of tensors."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _allocated(_rank, world_size, config):
    """Return (parameters, gradients, optimizer) bytes after one step, and the names and shapes of the parameters."""
    with distributed(config.parallel) as ranks:
        model = build_trained_model(config)
        num_samples = config.training.global_batch_size // ranks.data_parallel_size
        first = ranks.data_parallel_rank * num_samples
        size = config.training.micro_batch_size
        batches = (
            corrupt(packed_batch(range(start, start + size)), config.diffusion, config.training.seed)
            for start in range(first, first + num_samples, size)
        )
        run_micro_batches(config, model.chunks, batches, num_samples // size, training=True)
        assert model.optimizer.step()[0]
        parameters = [parameter for chunk in model.chunks for parameter in chunk.parameters()]
        buffers = [buffer for chunk in model.chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
        # The groups of the optimizers inside megatron-core's wrappers hold masters, or views of fp32 parameters.
        inner = [optimizer.optimizer for optimizer in getattr(model.optimizer, "chained_optimizers", [model.optimizer])]
        updated = [parameter for optimizer in inner for group in optimizer.param_groups for parameter in group["params"]]
        moments = [moment for optimizer in inner for state in optimizer.state.values() for moment in state.values()]
        own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        masters = [parameter for parameter in updated if parameter.untyped_storage().data_ptr() not in own]
        names = [(name, tuple(p.shape)) for stage in model.stages for name, p in global_named_parameters(stage)]
        return _storage_bytes(parameters), _storage_bytes([b.grad_data for b in buffers]), _storage_bytes(masters + moments), names


IN_EACH_RUN = (
    "data 3, overlap, bf16",
    "pipeline 2, virtual 2, data 2, bf16, tied",
    "context 2, tensor 2, bf16",
    "tensor 2, data 2, overlap, bf16, Muon",
    "tensor 2, data 2, bf16, adapters",
    "expert 2, one tensor rank of two an expert, overlap, bf16",
)


@pytest.mark.parametrize("name", slow_except(IN_EACH_RUN, CASES))
def test_state_bytes_are_those_of_a_real_run(name, monkeypatch):
    monkeypatch.setattr(buckets, "MIN_BUCKET_SIZE", 4000)
    monkeypatch.setattr(buckets, "MIN_BUCKET_SIZE_PER_RANK", 1)
    world_size, parallel, precision, model = CASES[name]
    data = world_size // math.prod(parallel.get(kind, 1) for kind in ("tensor", "pipeline", "context"))
    config = tiny_config(
        parallel=parallel,
        model={"num_layers": 4, **model},
        optimizer={"name": "muon" if "Muon" in name else "adamw"},
        adapters={"rank": 3, "train": ["*norm.weight"]} if "adapters" in name else {},
        training={"precision": precision, "global_batch_size": 12, "micro_batch_size": 12 // (2 * data)},
        diffusion={"num_strata": 4},
    )
    layout = layout_of(config, world_size)
    results = run_distributed(_allocated, world_size, config, timeout=120, process_group=False)
    for rank, (parameters, gradients, optimizer, names) in enumerate(results):
        place = layout.coordinates(rank)
        chunks = [chunk_parameters(config.model, layout, chunk, config.adapters) for chunk in chunks_of(layout, place.pipeline)]
        assert [(p.name, p.shape) for chunk in chunks for p in chunk] == names
        states = stage_state_bytes(chunks, layout, place.pipeline, precision, config.optimizer.name)
        ranks_of_stage = world_size // layout.pipeline
        state = states[rank % ranks_of_stage * len(states) // ranks_of_stage]
        predicted = state.others + state.experts
        assert (predicted.parameters, predicted.gradients, predicted.optimizer) == (parameters, gradients, optimizer), rank


def test_shares_add_up_to_the_parameters_without_padding():
    parameters = [Parameter("a", (7,)), Parameter("b", (130, 3), has_own_bucket=True), Parameter("c", (1000,)), Parameter("d", (64,))]
    for num_shards in (1, 2, 3, 512):
        buckets = buffer_layout(parameters, num_shards)
        assert [len(bucket.spans) for bucket in buckets] == [2, 1, 1]
        assert all((bucket.end - bucket.start) % num_shards == 0 for bucket in buckets)
        assert sum(shard_numels(buckets, num_shards)) == sum(parameter.numel for parameter in parameters)
