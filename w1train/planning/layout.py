"""Ranks, pipeline chunks and micro-batches of a layout, as arithmetic.

megatron-core numbers ranks with tensor-parallel neighbours first, then context, data and pipeline ("tp-cp-dp-pp").
A *chunk* is a run of consecutive layers; a rank has one, or ``virtual_pipeline`` of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from w1train.config.schema import Config, ModelConfig

Recompute = Literal["none", "selective", "full"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class Coordinates:
    """A rank's place in each kind of group."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of the model that one rank runs between two sends."""

    pipeline_rank: int
    virtual_stage: int
    first_layer: int
    num_layers: int
    has_embedding: bool
    has_head: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run is spread over ``world_size`` ranks."""

    world_size: int
    tensor: int
    sequence: bool
    pipeline: int
    data: int
    """Data-parallel ranks: each has samples of its own."""
    micro_batch_size: int
    num_micro_batches: int
    """Micro-batches of one rank in one optimizer step."""
    distributed_optimizer: bool
    recompute: Recompute
    recompute_num_layers: int
    virtual_pipeline: int = 1
    context: int = 1

    @property
    def num_optimizer_shards(self) -> int:
        """Gradients are summed, and optimizer states sharded, over data- and context-parallel ranks alike."""
        return self.data * self.context

    def coordinates(self, rank: int) -> Coordinates:
        """The place of a global rank."""
        rank, tensor = divmod(rank, self.tensor)
        rank, context = divmod(rank, self.context)
        pipeline, data = divmod(rank, self.data)
        return Coordinates(tensor, context, data, pipeline)

    def rank(self, place: Coordinates) -> int:
        """The inverse of ``coordinates``."""
        return place.tensor + self.tensor * (place.context + self.context * (place.data + self.data * place.pipeline))


def layout_of(config: Config, world_size: int) -> Layout:
    """The layout of a configuration that ``w1train.config.validate`` has passed for this world size."""
    parallel, training = config.parallel, config.training
    data = world_size // (parallel.tensor * parallel.pipeline)
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
        recompute_num_layers=parallel.recompute_num_layers,
    )


def chunks_of(layout: Layout, model: ModelConfig, pipeline_rank: int) -> list[Chunk]:
    """The chunks of a pipeline rank. Virtual stage v of rank p begins with layer (v P + p) L / (V P), as megatron-core deals them."""
    per_chunk = model.num_layers // (layout.pipeline * layout.virtual_pipeline)
    last = (layout.pipeline - 1, layout.virtual_pipeline - 1)
    return [
        Chunk(
            pipeline_rank=pipeline_rank,
            virtual_stage=stage,
            first_layer=(stage * layout.pipeline + pipeline_rank) * per_chunk,
            num_layers=per_chunk,
            has_embedding=(pipeline_rank, stage) == (0, 0),
            has_head=(pipeline_rank, stage) == last,
        )
        for stage in range(layout.virtual_pipeline)
    ]


def in_flight(layout: Layout, pipeline_rank: int) -> list[int]:
    """Most micro-batches whose activations each chunk of a rank holds at once (1F1B; arXiv 2104.04473, section 2.2).

    Without virtual stages rank p of P has run P - p forward passes before its first backward pass. Interleaved, it has
    run 2 (P - p - 1) + (V - 1) P + 1 of them; passes go P micro-batches to a chunk, chunk after chunk.
    """
    stages, virtual = layout.pipeline, layout.virtual_pipeline
    if virtual == 1:
        return [min(stages - pipeline_rank, layout.num_micro_batches)]
    passes = min(2 * (stages - pipeline_rank - 1) + (virtual - 1) * stages + 1, layout.num_micro_batches * virtual)
    return [sum(1 for number in range(passes) if number // stages % virtual == chunk) for chunk in range(virtual)]


def bubble_fraction(layout: Layout) -> float:
    """Share of a step that a rank waits for the pipeline to fill and drain: (P - 1) / (V M + P - 1) (arXiv 2104.04473, section 2.2)."""
    idle = layout.pipeline - 1
    return idle / (layout.virtual_pipeline * layout.num_micro_batches + idle)
