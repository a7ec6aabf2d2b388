"""Ranks, pipeline chunks and micro-batches of a layout, as arithmetic.

megatron-core numbers ranks with tensor-parallel neighbours first, then context, data and pipeline ("tp-cp-dp-pp"). For the routed experts
it divides the same ranks of a pipeline stage in another way: expert-tensor-parallel neighbours first, then expert-parallel ranks, and then
the data-parallel ranks of the experts.
A *chunk* is a run of consecutive layers; a rank has one, or ``virtual_pipeline`` of them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from w1train.config.schema import Config, ModelConfig, ParallelConfig
from w1train.engine.buckets import bucket_size
from w1train.model.flops import num_expert_layers

Recompute = Literal["none", "selective", "full"]
Precision = Literal["fp32", "bf16"]
ContextMethod = Literal["all_gather", "all_to_all"]
Dispatcher = Literal["all_to_all", "all_gather"]


@dataclass(frozen=True, slots=True)
class Coordinates:
    """A rank's place in each kind of group."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True, slots=True)
class ExpertCoordinates:
    """A rank's place in the groups of the routed experts."""

    expert_tensor: int
    expert: int
    expert_data: int
    pipeline: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of the model that one rank runs between two sends."""

    pipeline_rank: int
    first_layer: int
    num_layers: int
    num_expert_layers: int
    """Layers of the chunk that have experts."""
    has_embedding: bool
    has_head: bool

    @property
    def kind(self) -> tuple[int, int, bool, bool]:
        """The fields that decide the sizes and the work of a chunk. Its other fields are places in the model."""
        return self.num_layers, self.num_expert_layers, self.has_embedding, self.has_head


@dataclass(frozen=True, slots=True)
class Layout:
    """The distribution of a run over ``world_size`` ranks."""

    world_size: int
    tensor: int
    sequence: bool
    pipeline: int
    data: int
    """Number of data-parallel ranks, each of which has its own samples."""
    micro_batch_size: int
    num_micro_batches: int
    """Micro-batches of one rank in one optimizer step."""
    distributed_optimizer: bool
    recompute: Recompute
    recompute_experts: bool
    recompute_num_layers: int
    virtual_pipeline: int
    chunk_layers: tuple[int, ...]
    """Layers of each chunk, in the order in which a micro-batch passes the chunks: the first chunk of every stage, then the second."""
    num_dense_layers: int
    """The first layers of the model, which have no experts."""
    context: int
    context_method: ContextMethod
    context_chunk_size: int
    loss_chunk_size: int | None
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    expert: int
    expert_tensor: int
    expert_dispatcher: Dispatcher

    @property
    def num_optimizer_shards(self) -> int:
        """Ranks over which gradients are summed and optimizer states sharded: data- and context-parallel ranks together."""
        return self.data * self.context

    @property
    def repeats_experts(self) -> bool:
        """Tell whether the layers of experts are computed twice."""
        return self.recompute == "full" or (self.recompute == "selective" and self.recompute_experts)

    @property
    def expert_data(self) -> int:
        """Ranks over which the gradients of the routed experts are summed, and their optimizer states sharded."""
        return self.world_size // (self.pipeline * self.num_expert_slices)

    @property
    def num_expert_slices(self) -> int:
        """Ranks that share the routed experts of a layer."""
        return self.expert * self.expert_tensor

    @property
    def shards(self) -> list[tuple[int, int]]:
        """The optimizer shards of the ranks of a pipeline stage in their order: the shard of all parameters but the routed experts, and
        that of the experts. Neighbours whose shards are always equal have one entry."""
        step = math.gcd(self.tensor, self.num_expert_slices)
        ranks = range(0, self.world_size // self.pipeline, step)
        return [(rank // self.tensor, rank // self.num_expert_slices) for rank in ranks]

    def bucket_size(self, pipeline_rank: int) -> int | None:
        """Return the elements after which a bucket of gradients ends; None if one bucket has all gradients."""
        return bucket_size(self.num_optimizer_shards, pipeline_rank, overlap_grad_reduce=self.overlap_grad_reduce)

    def coordinates(self, rank: int) -> Coordinates:
        """Return the coordinates of a global rank."""
        rank, tensor = divmod(rank, self.tensor)
        rank, context = divmod(rank, self.context)
        pipeline, data = divmod(rank, self.data)
        return Coordinates(tensor, context, data, pipeline)

    def rank(self, place: Coordinates) -> int:
        """Return the global rank of coordinates."""
        return place.tensor + self.tensor * (place.context + self.context * (place.data + self.data * place.pipeline))

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """Return the coordinates of a global rank in the groups of the experts."""
        rank, expert_tensor = divmod(rank, self.expert_tensor)
        rank, expert = divmod(rank, self.expert)
        pipeline, expert_data = divmod(rank, self.expert_data)
        return ExpertCoordinates(expert_tensor, expert, expert_data, pipeline)


def layout_of(config: Config, world_size: int) -> Layout:
    """Return the layout of a configuration that is valid (``w1train.config.rules.validate``) for this world size.

    Where the batch size changes with the schedule, the layout is that of training.global_batch_size.
    """
    parallel, training = config.parallel, config.training
    data = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    return Layout(
        world_size=world_size,
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        pipeline=parallel.pipeline,
        data=data,
        micro_batch_size=training.micro_batch_size,
        num_micro_batches=training.global_batch_size // (training.micro_batch_size * data),
        distributed_optimizer=parallel.distributed_optimizer,
        recompute=parallel.recompute,
        recompute_experts=parallel.recompute_experts,
        recompute_num_layers=parallel.recompute_num_layers,
        virtual_pipeline=parallel.virtual_pipeline,
        chunk_layers=deal_layers(config.model, parallel),
        num_dense_layers=config.model.num_layers - num_expert_layers(config.model),
        context=parallel.context,
        context_method=parallel.context_method,
        context_chunk_size=parallel.context_chunk_size,
        loss_chunk_size=training.loss_chunk_size,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        expert_dispatcher=parallel.expert_dispatcher,
    )


def deal_layers(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """Return the layers of each chunk, as megatron-core distributes them.

    Stages have equal shares, except a first or last stage whose count is given. A stage's share is divided equally among its chunks. An
    embedding or head that counts as a layer takes the place of one layer.
    """
    stages, virtual = parallel.pipeline, parallel.virtual_pipeline
    ends = (parallel.num_layers_in_first_stage, parallel.num_layers_in_last_stage)
    fixed = [count for count in ends if count is not None]
    counted = parallel.embedding_counts_as_layer + parallel.head_counts_as_layer
    middle = (model.num_layers + counted - sum(fixed)) // max(1, stages - len(fixed))
    per_stage = [middle] * stages
    for stage, count in ((0, ends[0]), (-1, ends[1])):
        if count is not None:
            per_stage[stage] = count
    chunks = [count // virtual for _ in range(virtual) for count in per_stage]
    chunks[0] -= parallel.embedding_counts_as_layer
    chunks[-1] -= parallel.head_counts_as_layer
    return tuple(chunks)


def chunks_of(layout: Layout, pipeline_rank: int) -> list[Chunk]:
    """Return the chunks of a pipeline rank."""
    return [_chunk(layout, number) for number in range(pipeline_rank, len(layout.chunk_layers), layout.pipeline)]


def _chunk(layout: Layout, number: int) -> Chunk:
    first, num_layers = sum(layout.chunk_layers[:number]), layout.chunk_layers[number]
    return Chunk(
        pipeline_rank=number % layout.pipeline,
        first_layer=first,
        num_layers=num_layers,
        num_expert_layers=max(0, first + num_layers - max(first, layout.num_dense_layers)),
        has_embedding=number == 0,
        has_head=number == len(layout.chunk_layers) - 1,
    )


def in_flight(layout: Layout, pipeline_rank: int) -> frozenset[tuple[int, ...]]:
    """Return how many micro-batches' activations each chunk of a rank holds at its peaks (1F1B; arXiv 2104.04473, section 2.2).

    A rank first runs some forward passes, then forward and backward passes in turn. Rank p of P begins with P - p - 1 forward passes, or
    with 2 (P - p - 1) + (V - 1) P forward passes if stages are interleaved. P micro-batches pass one chunk, then the next chunk; backward
    passes take the chunks in the opposite order.
    """
    stages, virtual = layout.pipeline, layout.virtual_pipeline
    # Once the pipeline is full, the counts repeat with every P micro-batches.
    return _held_at_peaks(stages, virtual, min(layout.num_micro_batches, 4 * stages), pipeline_rank)


@functools.cache
def _held_at_peaks(stages: int, virtual: int, num_micro_batches: int, pipeline_rank: int) -> frozenset[tuple[int, ...]]:
    num_passes = num_micro_batches * virtual
    lead = stages - pipeline_rank - 1 if virtual == 1 else 2 * (stages - pipeline_rank - 1) + (virtual - 1) * stages
    held, peaks = [0] * virtual, set()
    for number in range(num_passes):
        held[number // stages % virtual] += 1
        if number >= lead or number == num_passes - 1:
            peaks.add(tuple(held))
        if number >= lead:
            held[virtual - 1 - (number - lead) // stages % virtual] -= 1
    return frozenset(peaks)


def bubble_fraction(layout: Layout) -> float:
    """Return the share of a step in which a rank waits for the pipeline to fill and drain: (P - 1) / (V M + P - 1) (arXiv 2104.04473,
    section 2.2)."""
    idle = layout.pipeline - 1
    return idle / (layout.virtual_pipeline * layout.num_micro_batches + idle)
