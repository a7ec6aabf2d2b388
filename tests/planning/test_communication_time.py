"""Predicted collectives, compared with those that a real step starts in torch's process groups."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_distributed
from tests.slow import slow_except
from tests.tiny import packed_batch, tiny_config, tiny_experts
from w1train.planning.assumptions import DEVICES, Assumptions
from w1train.planning.plan_prediction import predict
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine.building import build_trained_model  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.forward import run_micro_batches  # noqa: E402

# The places of the whole (gathered) tensor and of the process group among an operator's arguments.
OPERATORS = {
    "allreduce_": ("all_reduce", 0, 1),
    "allreduce_coalesced_": ("all_reduce", 0, 1),
    "_allgather_base_": ("all_gather", 0, 2),
    "allgather_into_tensor_coalesced_": ("all_gather", 0, 2),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, 2),
    "alltoall_base_": ("all_to_all", 1, 2),
    # Parts of unequal lengths, which routed tokens have.
    "allgather_": ("all_gather", 0, 2),
    "reduce_scatter_": ("reduce_scatter", 1, 2),
    "send": ("send", 0, 1),
}


class _CountCollectives(TorchDispatchMode):
    """Count the bytes of the whole tensor of every collective among several ranks, by kind."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("c10d::").split(".")[0]
        if function.namespace == "c10d" and name not in ("recv_", "broadcast_"):
            self._count(*OPERATORS[name], args)
        return function(*args, **(kwargs or {}))

    def _count(self, kind, tensors_at, group_at, args):
        if torch.distributed.ProcessGroup.unbox(args[group_at]).size() == 1:
            return
        tensors = args[tensors_at] if isinstance(args[tensors_at], (list, tuple)) else [args[tensors_at]]
        tensors = [tensor for part in tensors for tensor in (part if isinstance(part, list) else [part])]
        # The plan leaves out the reductions of a few numbers: sums for the log (float64), gradient norm, counts of tokens (int64).
        counted = [tensor for tensor in tensors if tensor.numel() > 1 and tensor.dtype not in (torch.float64, torch.int64)]
        if counted:
            self.bytes[kind] += sum(tensor.numel() * tensor.element_size() for tensor in counted)


def _one_step_each(_rank, _world_size, configs):
    """Measure all cases on the same ranks: to fork ranks and make their groups takes longer than a step."""
    with distributed(configs[0].parallel) as ranks:
        return [_one_step(ranks, config) for config in configs]


def _one_step(ranks, config):
    model = build_trained_model(config)
    num_samples = config.training.global_batch_size // ranks.data_parallel_size
    size = config.training.micro_batch_size
    first = ranks.data_parallel_rank * num_samples
    # Multiples of 3 have no padding, so that every position has logits.
    batches = (
        corrupt(packed_batch([3 * index for index in range(start, start + size)]), config.diffusion, 0)
        for start in range(first, first + num_samples, size)
    )
    with _CountCollectives() as count:
        run_micro_batches(config, model.chunks, batches, num_samples // size, training=True)
        model.optimizer.step()
    return dict(count.bytes)


LAYOUTS = {
    "tensor 2, data 2": (4, {"tensor": 2}),
    "tensor 2, sequence, data 2": (4, {"tensor": 2, "sequence": True}),
    "tensor 2, sequence, full, data 2": (4, {"tensor": 2, "sequence": True, "recompute": "full"}),
    "pipeline 2, data 2": (4, {"pipeline": 2}),
    "tensor 2, pipeline 2, plain optimizer, data 2": (8, {"tensor": 2, "pipeline": 2, "distributed_optimizer": False}),
    "pipeline 2, virtual 2, tensor 2, data 2": (8, {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2, "sequence": True}),
    "context 2, tensor 2": (4, {"context": 2, "context_chunk_size": 8, "tensor": 2, "sequence": True}),
    "context 2, recompute": (2, {"context": 2, "context_chunk_size": 8, "recompute": "selective"}),
    "heads": (2, {"context": 2, "context_method": "all_to_all"}),
}
EXPERT_LAYOUTS = {
    "expert 2": (2, {"expert": 2}),
    "expert 2, full": (2, {"expert": 2, "recompute": "full"}),
    "expert 2, all-gather, data 4": (4, {"expert": 2, "expert_dispatcher": "all_gather"}),
    "expert tensor 2, tensor 2": (2, {"expert_tensor": 2, "tensor": 2, "sequence": True}),
    "expert 2, tensor 2, pipeline 2": (4, {"expert": 2, "tensor": 2, "sequence": True, "pipeline": 2}),
    "expert 2, context 2, data 2": (4, {"expert": 2, "context": 2, "context_chunk_size": 8}),
}


MODELS = {
    "blocks": ({}, {"block_size": 4, "block_index": "sample"}),
    "tied": ({"qk_norm": True, "tie_embeddings": True, "num_query_groups": 2}, {}),
}


EXPERT_MODELS = {
    "blocks": (tiny_experts(), {"block_size": 4, "block_index": "sample"}),
    "softmax": (tiny_experts(shared_ffn_hidden_size=0, num_dense_layers=0, router_precision="model"), {}),
}
IN_EACH_RUN = ("pipeline 2, data 2",)


@pytest.mark.parametrize("name", slow_except(IN_EACH_RUN, LAYOUTS))
def test_bytes_are_those_of_a_real_step(name):
    for rank, steps in enumerate(_planned_and_measured(*LAYOUTS[name], MODELS)):
        for model, (planned, measured) in zip(MODELS, steps, strict=True):
            assert planned == measured, (model, rank)


@pytest.mark.parametrize("name", slow_except(["expert 2, tensor 2, pipeline 2"], EXPERT_LAYOUTS))
def test_bytes_of_experts_are_those_of_a_real_step(name):
    """All ranks together: the rows that a rank receives, and sends back, depend on the choices of experts, and their sum does not."""
    ranks = _planned_and_measured(*EXPERT_LAYOUTS[name], EXPERT_MODELS)
    for model, of_ranks in zip(EXPERT_MODELS, zip(*ranks, strict=True), strict=True):
        planned, measured = (sum(map(Counter, kind), Counter()) for kind in zip(*of_ranks, strict=True))
        assert planned == measured, model


def _planned_and_measured(world_size, parallel, models):
    """Return for each rank and model the bytes by collective."""
    configs = [
        tiny_config(
            parallel=parallel,
            model={"num_layers": 4, **model},
            training={"global_batch_size": 8, "micro_batch_size": 2},
            # Every token is masked, so that the number of logits is known.
            diffusion={"random_length_probability": 0.0, "t_min": 1.0 - 1e-9, "t_max": 1.0, **blocks},
        )
        for model, blocks in models.values()
    ]
    plans = [predict(config, world_size, DEVICES["h100"], Assumptions()) for config in configs]
    results = run_distributed(_one_step_each, world_size, configs, timeout=120, process_group=False)
    return [[(_planned(plan, rank), measured) for plan, measured in zip(plans, steps, strict=True)] for rank, steps in enumerate(results)]


def _planned(plan, rank):
    predicted = Counter()
    for item in plan.stages[plan.layout.coordinates(rank).pipeline].traffic:
        predicted[item.collective] += item.tensor_bytes
    return dict(predicted)
