"""The plan of one layout: memory, traffic and speed of every pipeline rank, from the closed forms of this package."""

from __future__ import annotations

from dataclasses import dataclass, replace

from w1train.config.schema import Config
from w1train.planning import communication, timing
from w1train.planning.activations import CUDA_KERNELS, ActivationBytes, Sizes, chunk_activation_bytes, sizes_of, working_bytes
from w1train.planning.assumptions import Assumptions, Device
from w1train.planning.communication import Traffic
from w1train.planning.layout import Chunk, Layout, bubble_fraction, chunks_of, in_flight, layout_of
from w1train.planning.parameters import Parameter, chunk_parameters
from w1train.planning.state import StateBytes, state_bytes
from w1train.planning.timing import StageSeconds
from w1train.planning.workload import Workload, flops_per_token, workload_of
from w1train.training.schedule import total_tokens

RECOMPUTE_CHOICES = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One pipeline rank."""

    pipeline_rank: int
    chunks: list[Chunk]
    num_parameters: int
    """On each of its ranks."""
    state: StateBytes
    """Of the data-parallel rank with most."""
    in_flight: list[int]
    """Micro-batches whose activations each chunk holds at once."""
    activations: list[ActivationBytes]
    """Of one micro-batch, by chunk."""
    activation_bytes: int
    """Of all micro-batches in flight."""
    activations_by_recompute: dict[str, int]
    """Bytes of all micro-batches in flight, under each choice of recomputation."""
    working_bytes: int
    traffic: list[Traffic]
    seconds: StageSeconds

    @property
    def total_bytes(self) -> int:
        """Everything predicted; what is reserved comes on top."""
        return self.state.total + self.activation_bytes + self.working_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """A run on a number of devices."""

    config: Config
    layout: Layout
    work: Workload
    device: Device
    assumptions: Assumptions
    stages: list[StagePlan]
    flops_per_token: dict[str, float]
    """By part, and their total."""

    @property
    def needed_bytes(self) -> int:
        """On the fullest device, reserve included."""
        return max(stage.total_bytes for stage in self.stages) + round(self.assumptions.reserved_gib * 2**30)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.device.memory_bytes

    @property
    def bubble_fraction(self) -> float:
        return bubble_fraction(self.layout)

    @property
    def step_seconds(self) -> float:
        """The slowest stage sets the pace of the pipeline, whose filling and draining come on top; then the work once a step."""
        pace = max(stage.seconds.per_micro_batches for stage in self.stages) / (1 - self.bubble_fraction)
        return pace + max(stage.seconds.gradients_and_optimizer + stage.seconds.data_parallel for stage in self.stages)

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.global_batch_size * self.config.data.sequence_length

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def tflops_per_device(self) -> float:
        """Model TFLOP/s."""
        return self.flops_per_token["total"] * self.tokens_per_second / self.layout.world_size / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOPs against the device's dense bf16 peak."""
        return self.tflops_per_device / self.device.peak_tflops

    @property
    def days(self) -> float:
        """For the schedule's tokens."""
        return total_tokens(self.config.schedule) / self.tokens_per_second / 86400


def predict(config: Config, world_size: int, device: Device, assumptions: Assumptions, document_length: int | None = None) -> Plan:
    """The plan of a configuration that is valid for ``world_size`` devices."""
    layout, work = layout_of(config, world_size), workload_of(config, document_length)
    stages = [_stage(config, layout, work, device, assumptions, rank) for rank in range(layout.pipeline)]
    return Plan(config, layout, work, device, assumptions, stages, flops_per_token(config, work))


def _stage(config: Config, layout: Layout, work: Workload, device: Device, assumptions: Assumptions, pipeline_rank: int) -> StagePlan:
    model, precision = config.model, config.training.precision
    chunks = chunks_of(layout, model, pipeline_rank)
    parameters = [chunk_parameters(model, layout, chunk) for chunk in chunks]
    by_document = config.diffusion.timestep_per == "document"
    expected_logits = round(layout.micro_batch_size * work.num_logits / layout.context)
    # Time is for what is expected, memory for the most there can be.
    most = sizes_of(model, layout, work, precision, segment_indexed=by_document)
    usual = sizes_of(model, layout, work, precision, segment_indexed=by_document, num_logits=expected_logits)
    states = state_bytes(parameters, precision, layout.num_optimizer_shards, distributed=layout.distributed_optimizer)
    traffic = _traffic(usual, layout, chunks, parameters, precision)
    state = max(states, key=lambda bytes_of_rank: bytes_of_rank.total)
    return StagePlan(
        pipeline_rank=pipeline_rank,
        chunks=chunks,
        num_parameters=sum(parameter.numel for chunk in parameters for parameter in chunk),
        state=state,
        in_flight=in_flight(layout, pipeline_rank),
        activations=[chunk_activation_bytes(most, CUDA_KERNELS, layout, chunk) for chunk in chunks],
        activation_bytes=_held(most, layout, chunks),
        activations_by_recompute={choice: _held(most, replace(layout, recompute=choice), chunks) for choice in RECOMPUTE_CHOICES},
        working_bytes=max(working_bytes(most, CUDA_KERNELS, layout, chunk) for chunk in chunks),
        traffic=traffic,
        seconds=_seconds(config, layout, work, device, assumptions, usual, chunks, parameters, state, traffic),
    )


def _held(sizes: Sizes, layout: Layout, chunks: list[Chunk]) -> int:
    counts = in_flight(layout, chunks[0].pipeline_rank)
    return sum(count * chunk_activation_bytes(sizes, CUDA_KERNELS, layout, chunk).total for count, chunk in zip(counts, chunks, strict=True))


def _traffic(sizes: Sizes, layout: Layout, chunks: list[Chunk], parameters: list[list[Parameter]], precision: str) -> list[Traffic]:
    traffic: list[Traffic] = []
    for chunk, own in zip(chunks, parameters, strict=True):
        traffic += communication.tensor_parallel_traffic(sizes, layout, chunk)
        traffic += communication.pipeline_traffic(sizes, layout, chunk)
        traffic += communication.data_parallel_traffic(own, layout, precision)
    of_rank = [parameter for own in parameters for parameter in own]
    traffic += communication.replicated_gradient_traffic(of_rank, layout)
    traffic += communication.copied_gradient_traffic(of_rank, layout)
    return traffic


def _seconds(
    config: Config,
    layout: Layout,
    work: Workload,
    device: Device,
    assumptions: Assumptions,
    sizes: Sizes,
    chunks: list[Chunk],
    parameters: list[list[Parameter]],
    state: StateBytes,
    traffic: list[Traffic],
) -> StageSeconds:
    matmul = attention = elementwise = 0.0
    memory_bandwidth = device.memory_gb_per_second * 1e9 * assumptions.memory_efficiency
    for chunk, own in zip(chunks, parameters, strict=True):
        flops = timing.chunk_flops(config.model, layout, work, chunk, sizes.num_logits)
        of_matmul, of_attention = timing.compute_seconds(flops, layout, work, device, assumptions)
        matmul += of_matmul
        attention += of_attention
        elementwise += timing.elementwise_bytes(sizes, layout, chunk, own) / memory_bandwidth

    def spent(*, per_step: bool, collective: str | None = None) -> float:
        return sum(
            communication.seconds(item, layout, device, assumptions)
            for item in traffic
            if item.is_per_step == per_step and (collective is None or (item.collective == "send") == (collective == "send"))
        )

    micro_batches = layout.num_micro_batches
    return StageSeconds(
        matmul=matmul * micro_batches,
        attention=attention * micro_batches,
        elementwise=elementwise * micro_batches,
        tensor_parallel=spent(per_step=False, collective="other"),
        pipeline_sends=spent(per_step=False, collective="send"),
        gradients_and_optimizer=timing.optimizer_pass_bytes(state, config.training.precision) / memory_bandwidth,
        data_parallel=spent(per_step=True),
    )
