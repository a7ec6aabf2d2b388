"""Bytes of every collective of a step, and the bandwidth of the links that it uses.

A ring moves (n - 1) / n of the tensor out of each rank for an all-gather or a reduce-scatter, and twice that for an all-reduce.
Reductions of a few numbers (loss sums, gradient norm, token counts) are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from w1train.planning.activations import Sizes
from w1train.planning.assumptions import Assumptions, Device
from w1train.planning.layout import Chunk, Layout, Precision
from w1train.planning.parameters import Parameter
from w1train.planning.state import FP32_BYTES, PRECISION_BYTES, buffer_layout

Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]
Group = Literal["tensor", "context", "data", "pipeline", "embedding", "expert", "expert_tensor", "expert_data", "experts"]
"""Ranks that communicate. experts: the expert-parallel and the expert-tensor-parallel ranks together."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """One kind of collective of one rank in one step."""

    name: str
    group: Group
    collective: Collective
    group_size: int
    num_calls: int
    tensor_bytes: int
    """Bytes of all calls together: of the whole (gathered) tensor, or in an all-to-all of the part that one rank sends."""
    is_per_step: bool = False
    """True: the collective runs once a step, after the last micro-batch. False: it runs with every micro-batch."""

    @property
    def sent_bytes(self) -> int:
        """Bytes that each rank sends, in all calls together."""
        if self.collective == "send":
            return self.tensor_bytes
        return (2 if self.collective == "all_reduce" else 1) * self.tensor_bytes * (self.group_size - 1) // self.group_size


def tensor_parallel_traffic(sizes: Sizes, layout: Layout, chunk: Chunk) -> Iterator[Traffic]:
    """Yield the traffic of activations within the tensor-parallel group, in one step.

    Each dense layer has two pairs of linear layers, and a layer with experts has a second pair if it has a shared expert. With sequence
    parallelism, the forward pass gathers the input of the first layer of a pair
    and reduce-scatters the output of the second; the backward pass gathers the output's gradient and the first layer's input again, and
    reduce-scatters the input's gradient. Without sequence parallelism, each pass has one all-reduce. Full recomputation repeats the forward
    pass.
    """
    if layout.tensor == 1:
        return
    micro_batches, whole = layout.num_micro_batches, sizes.positions * sizes.hidden * sizes.element
    again = 1 if layout.recompute == "full" else 0

    def traffic(name: str, collective: Collective, calls: int, size: int) -> Traffic:
        calls *= micro_batches
        return Traffic(name, "tensor", collective, layout.tensor, calls, calls * size)

    has_shared = sizes.experts is not None and sizes.experts.shared_inner > 0
    pairs = 2 * chunk.num_layers - (0 if has_shared else chunk.num_expert_layers)
    ends, rows = int(chunk.has_embedding), sizes.num_logits
    repeats_shared = has_shared and layout.repeats_experts and not again
    shared_again = chunk.num_expert_layers if repeats_shared else 0
    if layout.sequence:
        head = int(chunk.has_head)
        yield traffic("activations", "all_gather", pairs * (3 + again) + shared_again + ends + head, whole)
        yield traffic("activations", "reduce_scatter", pairs * (2 + again) + shared_again + ends + head, whole)
    else:
        yield traffic("activations", "all_reduce", pairs * (2 + again) + ends, whole)
        if chunk.has_head:
            yield traffic("head input's gradient", "all_reduce", 1, rows * sizes.hidden * sizes.element)
    if chunk.has_head:
        yield traffic("cross-entropy", "all_reduce", 3, rows * FP32_BYTES)


def context_parallel_traffic(sizes: Sizes, layout: Layout, chunk: Chunk) -> Iterator[Traffic]:
    """Yield the traffic of keys and values and of their gradients, or of the exchange of heads for positions and back.

    Every kind of recomputation repeats the forward exchange, which is part of the core attention.
    """
    if sizes.travel is None:
        return
    passes = chunk.num_layers * layout.num_micro_batches
    forward = passes * (1 if layout.recompute == "none" else 2)
    if sizes.travel == "heads":
        size = sizes.positions * sizes.element * 2 * (sizes.query + sizes.key)
        yield Traffic("heads for positions", "context", "all_to_all", layout.context, 4 * (forward + passes), (forward + passes) * size)
        return
    streams = 2 if sizes.travel == "clean" else 1
    size = sizes.positions * layout.context // streams * 2 * sizes.key * sizes.element
    yield Traffic("keys and values", "context", "all_gather", layout.context, forward, forward * size)
    yield Traffic("their gradients", "context", "reduce_scatter", layout.context, passes, passes * size)


def replicated_gradient_traffic(parameters: Sequence[Parameter], layout: Layout) -> Iterator[Traffic]:
    """Yield the traffic of gradients that a tensor-parallel rank has only for its own tokens (sequence parallelism) or heads (QK-norm)."""
    if layout.tensor == 1:
        return
    summed = [p for p in parameters if not p.is_split and (layout.sequence or "q_layernorm" in p.name or "k_layernorm" in p.name)]
    if summed:
        size = FP32_BYTES * sum(parameter.numel for parameter in summed)
        yield Traffic("replicated parameters' gradients", "tensor", "all_reduce", layout.tensor, 1, size, True)


def data_parallel_traffic(
    parameters: Sequence[Parameter], layout: Layout, precision: Precision, pipeline_rank: int, num_optimizers: int = 1
) -> Iterator[Traffic]:
    """Yield the reduce-scatter of fp32 gradients and the gather of updated parameters; one all-reduce without the distributed optimizer.
    Routed experts have buffers, ranks and an optimizer of their own. Each of megatron-core's optimizers gathers all parameters of a
    chunk, and two of them gather them twice, unless the forward pass does it (parallel.overlap_param_gather)."""
    gathers = 1 if layout.overlap_param_gather else num_optimizers
    groups: tuple[tuple[Group, int, str], ...] = (
        ("data", layout.num_optimizer_shards, ""),
        ("expert_data", layout.expert_data, "experts' "),
    )
    for group, shards, whose in groups:
        own = [parameter for parameter in parameters if parameter.is_expert == (group == "expert_data")]
        if shards == 1 or not own:
            continue
        if not layout.distributed_optimizer:
            size = FP32_BYTES * sum(parameter.numel for parameter in own)
            yield Traffic(f"{whose}gradients", group, "all_reduce", shards, 1, size, True)
            continue
        buckets = buffer_layout(own, shards, layout.bucket_size(pipeline_rank))
        numel = buckets[-1].end
        yield Traffic(f"{whose}gradients", group, "reduce_scatter", shards, len(buckets), FP32_BYTES * numel, True)
        yield Traffic(
            f"{whose}parameters", group, "all_gather", shards, gathers * len(buckets), gathers * PRECISION_BYTES[precision] * numel, True
        )


def pipeline_traffic(sizes: Sizes, layout: Layout, chunk: Chunk) -> Iterator[Traffic]:
    """Yield the sends of hidden states to the next stage and of their gradients to the stage before."""
    sends = (0 if chunk.has_head else 1) + (0 if chunk.has_embedding else 1)
    if sends:
        calls = sends * layout.num_micro_batches
        yield Traffic("hidden states", "pipeline", "send", 2, calls, calls * sizes.residual)


def copied_gradient_traffic(parameters: Sequence[Parameter], layout: Layout) -> Iterator[Traffic]:
    """Yield the traffic of gradients of copied parameters: all pipeline ranks hold the timestep embedding, and the first and the last hold
    a tied embedding."""
    if layout.pipeline == 1:
        return
    copied = {parameter.name: parameter for parameter in parameters if parameter.has_own_bucket}
    conditioning = sum(parameter.numel for parameter in copied.values() if not parameter.is_split)
    if conditioning:
        yield Traffic("timestep embedding's gradients", "pipeline", "all_reduce", layout.pipeline, 1, FP32_BYTES * conditioning, True)
    tied = sum(parameter.numel for parameter in copied.values() if parameter.is_split)
    if tied:
        yield Traffic("tied embedding's gradient", "embedding", "all_reduce", 2, 1, FP32_BYTES * tied, True)


def merged(traffic: Iterable[Traffic]) -> list[Traffic]:
    """Merge equal collectives of several chunks of a rank into one entry."""
    by_kind: dict[tuple[str, str], Traffic] = {}
    for item in traffic:
        kind = (item.name, item.collective)
        before = by_kind.get(kind)
        if before is not None:
            item = replace(item, num_calls=before.num_calls + item.num_calls, tensor_bytes=before.tensor_bytes + item.tensor_bytes)
        by_kind[kind] = item
    return list(by_kind.values())


def bandwidth(traffic: Traffic, layout: Layout, device: Device, assumptions: Assumptions) -> float:
    """Return the bytes per second that one rank can send.

    A group within a node uses NVLink. A ring over several nodes enters and leaves each node once, by the network ports of all its members
    on that node, whose bandwidths add up. In an all-to-all each rank sends through its own port what goes to the other nodes.
    """
    stride = _stride(traffic.group, layout)
    node = device.devices_per_node
    reach = stride if traffic.collective == "send" else stride * (traffic.group_size - 1)
    if reach < node:
        return device.nvlink_gb_per_second * 1e9 * assumptions.network_efficiency
    members = max(1, node // stride)
    ports = float(members)
    if traffic.collective == "all_to_all":
        ports = (traffic.group_size - 1) / (traffic.group_size - members)
    return min(device.nvlink_gb_per_second, ports * device.network_gb_per_second) * 1e9 * assumptions.network_efficiency


def _stride(group: Group, layout: Layout) -> int:
    """Return the difference of the numbers of neighbours in a group."""
    strides: dict[Group, int] = {
        "context": layout.tensor,
        "data": layout.tensor,
        "pipeline": layout.world_size // layout.pipeline,
        "embedding": layout.world_size // layout.pipeline,
        "expert": layout.expert_tensor,
        "expert_data": layout.num_expert_slices,
    }
    return strides.get(group, 1)


def seconds(traffic: Traffic, layout: Layout, device: Device, assumptions: Assumptions) -> float:
    """Return the seconds of all calls, one after another. Rows of experts take the time of the rank that receives the most."""
    has_rows = traffic.group in ("expert", "expert_tensor")
    imbalance = min(assumptions.expert_imbalance, layout.expert) if has_rows else 1.0
    busiest = imbalance * traffic.sent_bytes
    return busiest / bandwidth(traffic, layout, device, assumptions) + traffic.num_calls * assumptions.collective_latency


def total_seconds(traffic: Iterable[Traffic], layout: Layout, device: Device, assumptions: Assumptions) -> float:
    """Return the seconds of several kinds of traffic, one after another."""
    return sum(seconds(item, layout, device, assumptions) for item in traffic)
