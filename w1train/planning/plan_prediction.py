"""The plan of one layout: memory, traffic and speed of every pipeline rank, from the closed forms of this package."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from w1train.config.schema import Config
from w1train.config.schema_model import ParallelConfig
from w1train.config.stages import at_stage
from w1train.objectives.description import num_measuring_passes
from w1train.planning import communication_time as communication
from w1train.planning import timing
from w1train.planning.activations import CUDA_KERNELS, ActivationBytes, Sizes, chunk_activation_bytes, sizes_of, working_bytes
from w1train.planning.assumptions import Assumptions, Device
from w1train.planning.communication_time import Group, Traffic
from w1train.planning.expert_timing import expert_seconds
from w1train.planning.expert_traffic import expert_traffic
from w1train.planning.layout import Chunk, Layout, Recompute, bubble_fraction, in_flight, layout_of
from w1train.planning.stage_weights import StageWeights, weights_of
from w1train.planning.state import StateBytes
from w1train.planning.timing import StageSeconds
from w1train.planning.workload import Workload, flops_per_token, workload_of

RECOMPUTE_CHOICES: tuple[Recompute, ...] = ("none", "selective", "full")


def with_recompute(parallel: ParallelConfig, recompute: Recompute, num_layers: int) -> ParallelConfig:
    """Return the layout with another recomputation. Only selective recomputation has a choice for layers of experts."""
    of_experts = parallel.recompute_experts and recompute == "selective"
    return dataclasses.replace(parallel, recompute=recompute, recompute_num_layers=num_layers, recompute_experts=of_experts)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The plan of one pipeline rank."""

    pipeline_rank: int
    chunks: list[Chunk]
    num_parameters: int
    """Parameters on each rank of the stage."""
    state: StateBytes
    """Bytes of state on the rank that has the most bytes of state."""
    expert_state: StateBytes
    """Bytes of ``state`` that belong to routed experts."""
    reference_bytes: int
    """Bytes of the weights of the frozen reference; 0 for a run without preferences."""
    in_flight: tuple[int, ...]
    """Micro-batches whose activations each chunk holds at once."""
    activations: list[ActivationBytes]
    """Saved bytes of one micro-batch, by chunk."""
    activation_bytes: int
    """Saved bytes of all micro-batches in flight."""
    working_bytes: int
    traffic: list[Traffic]
    seconds: StageSeconds

    @property
    def total_bytes(self) -> int:
        """All predicted bytes; reserved memory is not included."""
        return self.state.total + self.reference_bytes + self.activation_bytes + self.working_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run on a number of devices."""

    run: Config
    config: Config
    """The configuration that is planned: the run's, or that of a stage of its schedule."""
    layout: Layout
    work: Workload
    device: Device
    assumptions: Assumptions
    weights: list[StageWeights]
    stages: list[StagePlan]
    flops_per_token: dict[str, float]
    """Model FLOPs of a token by part, and their total."""
    document_length: int | None

    @property
    def needed_bytes(self) -> int:
        """Bytes on the device that needs most, reserved memory included."""
        return max(stage.total_bytes for stage in self.stages) + self.assumptions.reserved_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.device.memory_bytes

    @property
    def bubble_fraction(self) -> float:
        return bubble_fraction(self.layout)

    @property
    def rows_per_expert(self) -> float:
        """Rows of an expert in a micro-batch, on the rank that has the most; 0 for a dense model."""
        experts = self._setting.sizes().experts
        return 0.0 if experts is None else experts.rows_per_expert

    @property
    def step_seconds(self) -> float:
        """The seconds of a step. This is the time of the slowest pipeline rank, plus the bubble, plus the work that is done once in each
        step."""
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
        """Model TFLOP/s of one device."""
        return self.flops_per_token["total"] * self.tokens_per_second / self.layout.world_size / 1e12

    @property
    def mfu(self) -> float:
        """Share of the device's dense bf16 peak that model FLOPs reach."""
        return self.tflops_per_device / self.device.peak_tflops

    @property
    def days(self) -> float:
        """Days for all tokens of the schedule; each stage has its own batch size and objective."""
        return sum(self.days_of(name) for name in self.run.schedule.stages)

    def days_of(self, stage: str) -> float:
        """Return the days for the tokens of one stage."""
        return self.run.schedule.stages[stage].tokens / self.at_stage(stage).tokens_per_second / 86400

    @property
    def _setting(self) -> _Setting:
        return _Setting(self.config, self.layout, self.work, self.device, self.assumptions)

    def at_stage(self, name: str) -> Plan:
        """Return the plan of a stage of the schedule."""
        config = at_stage(self.run, name)
        if (config.diffusion, config.training) == (self.config.diffusion, self.config.training):
            return self
        layout, work = layout_of(config, self.layout.world_size), workload_of(config, self.document_length)
        setting = _Setting(config, layout, work, self.device, self.assumptions)
        return _plan(self.run, setting, self.weights, _memory(layout, setting.sizes(), self.weights), self.document_length)

    def activations_by_recompute(self, stage: StagePlan) -> dict[Recompute, int]:
        """Return the saved bytes of all micro-batches in flight on a stage, under each choice of recomputation."""
        sizes = self._setting.sizes()
        layouts = {choice: dataclasses.replace(self.layout, recompute=choice) for choice in RECOMPUTE_CHOICES}
        return {choice: _held(_saved(sizes, layout, stage.chunks), layout, stage.pipeline_rank).bytes for choice, layout in layouts.items()}


@dataclass(frozen=True, slots=True)
class _Setting:
    """Settings that all stages share."""

    config: Config
    layout: Layout
    work: Workload
    device: Device
    assumptions: Assumptions

    def sizes(self, num_logits: int | None = None) -> Sizes:
        """Return the sizes of a micro-batch; ``num_logits`` None stands for the largest possible number of logits."""
        precision, imbalance = self.config.training.precision, self.assumptions.expert_imbalance
        return sizes_of(self.config.model, self.layout, self.work, precision, num_logits, imbalance)

    @property
    def memory_bandwidth(self) -> float:
        """Achieved memory bandwidth in bytes per second."""
        return self.device.memory_gb_per_second * 1e9 * self.assumptions.memory_efficiency


def works_of(run: Config, document_length: int | None = None) -> dict[str, Workload]:
    """Return a sample of each stage of a run's schedule. If stages have equal batches, and micro-batches that need the same memory in every
    layout, the first of them stands for the others. No layout and no size of micro-batches changes the samples."""
    works: dict[Hashable, tuple[str, Workload]] = {}
    for name in run.schedule.stages:
        config = at_stage(run, name)
        work = workload_of(config, document_length)
        works.setdefault((config.training.global_batch_size, work.memory_key(config.parallel.context_chunk_size)), (name, work))
    return dict(works.values())


def predict(config: Config, world_size: int, device: Device, assumptions: Assumptions, document_length: int | None = None) -> Plan:
    """Return the plan of a valid configuration on ``world_size`` devices, for the stage of its schedule that needs most memory."""
    planner = Planner(world_size, device, assumptions, document_length, works_of(config, document_length))
    return planner.plan(config, weights_of(config, layout_of(config, world_size)))


@dataclass(frozen=True, slots=True)
class Planner:
    """The plans of one run in different layouts, and what these layouts share. ``config`` is always the run in one of the layouts, which is
    valid, and ``weights`` are ``weights_of`` this layout."""

    world_size: int
    device: Device
    assumptions: Assumptions
    document_length: int | None
    works: dict[str, Workload]
    """``works_of`` the run."""

    def plan(self, config: Config, weights: list[StageWeights]) -> Plan:
        """Return what ``predict`` returns."""
        fullest = self._fullest(config, weights)
        return _plan(config, fullest.setting, weights, fullest.memory, self.document_length)

    def plan_if_fits(self, config: Config, weights: list[StageWeights]) -> Plan | None:
        """Return the plan, or None if it does not fit. The time of a layout that does not fit is not computed."""
        fullest = self._fullest(config, weights)
        if fullest.bytes + self.assumptions.reserved_bytes > self.device.memory_bytes:
            return None
        return _plan(config, fullest.setting, weights, fullest.memory, self.document_length)

    def can_fit(self, weights: list[StageWeights]) -> bool:
        """Tell whether the weights leave memory for activations. If they do not, no micro-batch and no recomputation fits."""
        needed = max(stage.state.total + stage.reference_bytes for stage in weights)
        return needed + self.assumptions.reserved_bytes < self.device.memory_bytes

    def _fullest(self, config: Config, weights: list[StageWeights]) -> _Fullest:
        """Return the stage of the schedule that needs most memory, the first of several such stages."""
        candidates: dict[Hashable, _Fullest] = {}
        for name, work in self.works.items():
            stage = at_stage(config, name)
            setting = _Setting(stage, layout_of(stage, self.world_size), work, self.device, self.assumptions)
            sizes = setting.sizes()
            if (setting.layout, sizes) not in candidates:
                candidates[setting.layout, sizes] = _Fullest(setting, _memory(setting.layout, sizes, weights))
        return max(candidates.values(), key=lambda candidate: candidate.bytes)


class _Held(NamedTuple):
    """Activations of all micro-batches in flight at the peak of memory."""

    bytes: int
    counts: tuple[int, ...]


class _StageMemory(NamedTuple):
    """The memory of a pipeline rank."""

    state: int
    held: _Held
    activations: list[ActivationBytes]
    working: int

    @property
    def total(self) -> int:
        return self.state + self.held.bytes + self.working


class _Fullest(NamedTuple):
    """The stage of a schedule that needs most memory."""

    setting: _Setting
    memory: list[_StageMemory]

    @property
    def bytes(self) -> int:
        """Bytes of the pipeline rank that needs most."""
        return max(stage.total for stage in self.memory)


def _memory(layout: Layout, sizes: Sizes, weights: list[StageWeights]) -> list[_StageMemory]:
    """Return the memory of each pipeline rank.

    Args:
        sizes: those of a micro-batch with the largest possible number of logits.
    """
    known: dict[Hashable, tuple[list[ActivationBytes], int]] = {}
    memory = []
    for rank, stage in enumerate(weights):
        if stage.kind not in known:
            working = max(working_bytes(sizes, CUDA_KERNELS, layout, chunk, stage.largest_parameter) for chunk in stage.chunks)
            known[stage.kind] = _saved(sizes, layout, stage.chunks), working
        saved, working = known[stage.kind]
        memory.append(_StageMemory(stage.state.total + stage.reference_bytes, _held(saved, layout, rank), saved, working))
    return memory


def _saved(sizes: Sizes, layout: Layout, chunks: list[Chunk]) -> list[ActivationBytes]:
    return [chunk_activation_bytes(sizes, CUDA_KERNELS, layout, chunk) for chunk in chunks]


def _held(saved: list[ActivationBytes], layout: Layout, pipeline_rank: int) -> _Held:
    sizes = [chunk.total for chunk in saved]
    peaks = in_flight(layout, pipeline_rank)
    return max(_Held(sum(count * size for count, size in zip(counts, sizes, strict=True)), counts) for counts in peaks)


class _StageWork(NamedTuple):
    """The traffic and the time of a pipeline rank."""

    traffic: list[Traffic]
    seconds: StageSeconds


def _plan(run: Config, setting: _Setting, weights: list[StageWeights], memory: list[_StageMemory], document_length: int | None) -> Plan:
    config, layout, work = setting.config, setting.layout, setting.work
    # Time is planned for the expected number of logits.
    usual = setting.sizes(round(layout.micro_batch_size * work.num_logits / layout.context))
    works: dict[Hashable, _StageWork] = {}
    for stage in weights:
        if stage.kind not in works:
            traffic = _traffic(usual, layout, stage.chunks) + stage.traffic
            works[stage.kind] = _StageWork(traffic, _seconds(setting, usual, stage, traffic))
    stages = [_stage(rank, stage, memory[rank], works[stage.kind]) for rank, stage in enumerate(weights)]
    flops = flops_per_token(config, work)
    return Plan(run, config, layout, work, setting.device, setting.assumptions, weights, stages, flops, document_length)


def _stage(pipeline_rank: int, weights: StageWeights, memory: _StageMemory, work: _StageWork) -> StagePlan:
    return StagePlan(
        pipeline_rank=pipeline_rank,
        chunks=weights.chunks,
        num_parameters=sum(weights.num_parameters),
        state=weights.state.others + weights.state.experts,
        expert_state=weights.state.experts,
        reference_bytes=weights.reference_bytes,
        in_flight=memory.held.counts,
        activations=memory.activations,
        activation_bytes=memory.held.bytes,
        working_bytes=memory.working,
        traffic=work.traffic,
        seconds=work.seconds,
    )


def _traffic(sizes: Sizes, layout: Layout, chunks: list[Chunk]) -> list[Traffic]:
    """Return the collectives that run with every micro-batch."""
    traffic: list[Traffic] = []
    for chunk in chunks:
        traffic += communication.tensor_parallel_traffic(sizes, layout, chunk)
        traffic += communication.context_parallel_traffic(sizes, layout, chunk)
        traffic += expert_traffic(sizes.experts, layout, chunk)
        traffic += communication.pipeline_traffic(sizes, layout, chunk)
    return communication.merged(traffic)


def _seconds(setting: _Setting, sizes: Sizes, weights: StageWeights, traffic: list[Traffic]) -> StageSeconds:
    layout, device, assumptions = setting.layout, setting.device, setting.assumptions
    matmul = attention = elementwise = 0.0
    for chunk, num_trained in zip(weights.chunks, weights.num_trained, strict=True):
        flops = timing.chunk_flops(setting.config, layout, setting.work, chunk, sizes.num_logits)
        of_matmul, of_attention = timing.compute_seconds(flops, sizes, layout, setting.work, device, assumptions)
        matmul += of_matmul + expert_seconds(flops.experts, sizes, layout, chunk, device, assumptions)
        attention += of_attention
        elementwise += timing.elementwise_bytes(sizes, layout, chunk, num_trained) / setting.memory_bandwidth
    state = weights.state.others + weights.state.experts
    # A forward pass is a third of the computation of a micro-batch, and half of its communication.
    num_passes = num_measuring_passes(setting.config)
    computed, sent = layout.num_micro_batches * (1 + num_passes / 3), 1 + num_passes / 2
    spent = partial(communication.total_seconds, layout=layout, device=device, assumptions=assumptions)

    def of_groups(*groups: Group) -> float:
        return spent([item for item in traffic if item.group in groups and not item.is_per_step])

    return StageSeconds(
        matmul=matmul * computed,
        attention=attention * computed,
        elementwise=elementwise * computed,
        tensor_parallel=of_groups("tensor") * sent,
        context_parallel=of_groups("context") * sent,
        expert_parallel=of_groups("expert", "expert_tensor", "experts") * sent,
        pipeline_sends=of_groups("pipeline") * sent,
        gradients_and_optimizer=timing.optimizer_pass_bytes(state, setting.config.training.precision) / setting.memory_bandwidth
        + weights.optimizer_flops / (device.peak_tflops * 1e12 * assumptions.matmul_efficiency),
        data_parallel=spent([item for item in traffic if item.is_per_step]),
    )
