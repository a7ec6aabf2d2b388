"""Bytes that autograd saves for the backward pass, layer by layer, with and without recomputation.

The closed forms count unique storages, as ``torch.autograd.graph.saved_tensors_hooks`` sees them. Two sets of kernels save different
tensors for the same layer: on CUDA RMSNorm, SwiGLU and the rotary embedding are fused; on the CPU they are chains of element-wise
operations. The norms of the residual stream and the gates save the same tensors on both (w1train.kernels.modulation).

Shapes: s = positions of a rank in the residual stream (divided under sequence parallelism), l = positions of a rank in
attention and MLP, b = samples, h = hidden size, q and k = widths of queries and keys of a rank, f = FFN width of a rank, d = head
channels, g = segments, c = condition size, m = positions with logits, v = vocabulary of a rank, e = bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from w1train.config.schema import ModelConfig
from w1train.planning.expert_activations import ExpertSizes, dispatch_bytes, expert_bytes, expert_sizes
from w1train.planning.layout import Chunk, Layout, Precision
from w1train.planning.parameters import widths
from w1train.planning.state import FP32_BYTES, PRECISION_BYTES
from w1train.planning.workload import Workload

_INT64_BYTES = 8

Travel = Literal["clean", "all", "heads"]


@dataclass(frozen=True, slots=True)
class Kernels:
    """Choices of kernels, which decide how much an operation saves."""

    fused_norm: bool
    """True: the norm saves its input and one number for each row. False: it also saves the normalized rows, and in bf16 an fp32 copy of its
    input."""
    fused_swiglu: bool
    """True: SwiGLU saves its input. False: it also saves SiLU of one half and a copy of the other half."""
    fused_rotary: bool
    """True: the rotary embedding saves the angles, which all layers share. False: each layer saves cosines and sines for q and for k."""


CUDA_KERNELS = Kernels(fused_norm=True, fused_swiglu=True, fused_rotary=True)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that the closed forms take, for one micro-batch on one rank."""

    element: int
    samples: int
    positions: int
    """l, over all samples."""
    residual_positions: int
    """s, over all samples."""
    hidden: int
    channels: int
    heads: int
    query: int
    key: int
    ffn: int
    vocabulary: int
    num_logits: int
    loss_chunk: int | None
    """Positions whose logits are in memory at once; None = all positions."""
    segments: int
    condition: int
    frequencies: int
    segment_indexed: bool
    masked: bool
    travel: Travel | None
    """The tensors that context-parallel ranks exchange; None without context parallelism."""
    rows: int
    """Query rows of a sample in attention."""
    keys: int
    """Key columns of a sample in attention."""
    has_adaln: bool
    qk_norm: bool
    grouped_queries: bool
    experts: ExpertSizes | None
    """Sizes of the layers with experts; None = the model is dense."""

    @property
    def residual(self) -> int:
        """Bytes of a tensor of the residual stream, [s, b, h]."""
        return self.residual_positions * self.hidden * self.element


def sizes_of(
    model: ModelConfig, layout: Layout, work: Workload, precision: Precision, num_logits: int | None = None, imbalance: float = 1.0
) -> Sizes:
    """Return the sizes of one micro-batch; ``num_logits`` None stands for the largest possible number of logits.

    Args:
        imbalance: rows of the rank whose experts have the most, divided by their mean over ranks.
    """
    width, samples = widths(model), layout.micro_batch_size
    positions = samples * work.num_positions // layout.context
    residual_positions = positions // layout.tensor if layout.sequence else positions
    travel = travel_of(layout, work)
    return Sizes(
        element=PRECISION_BYTES[precision],
        samples=samples,
        positions=positions,
        residual_positions=residual_positions,
        hidden=model.hidden_size,
        channels=width.channels,
        heads=model.num_attention_heads // layout.tensor,
        query=width.query // layout.tensor,
        key=width.key // layout.tensor,
        ffn=model.ffn_hidden_size // layout.tensor,
        vocabulary=model.vocab_size // layout.tensor,
        num_logits=samples * work.most_logits // layout.context if num_logits is None else num_logits,
        loss_chunk=layout.loss_chunk_size,
        segments=samples * work.num_segments + work.num_clean_segments,
        condition=model.condition_size,
        frequencies=model.timestep_frequency_size,
        segment_indexed=work.segment_indexed,
        masked=work.may_need_mask,
        travel=travel,
        rows=work.num_positions if travel == "heads" else work.num_positions // layout.context,
        keys=work.num_tokens + work.num_tokens // layout.context if travel == "clean" else work.num_positions,
        has_adaln=model.conditioning == "adaln",
        qk_norm=model.qk_norm,
        grouped_queries=width.query != width.key,
        experts=expert_sizes(model, layout, residual_positions, PRECISION_BYTES[precision], imbalance),
    )


def travel_of(layout: Layout, work: Workload) -> Travel | None:
    """Return what context-parallel ranks exchange (w1train.attention.context_parallel): heads, all keys, or only the keys of the clean
    stream if no block crosses the border of a chunk. None without context parallelism."""
    if layout.context == 1:
        return None
    if layout.context_method == "all_to_all":
        return "heads"
    return "clean" if work.num_streams == 2 and work.blocks_stay_home(layout.context_chunk_size) else "all"


def norm_bytes(rows: int, size: int, element: int, kernels: Kernels, *, input_is_saved: bool = False) -> int:
    """Return the bytes that RMSNorm saves.

    A fused norm saves its input and 1/rms (fp32) of each row. An unfused norm also saves x/rms in fp32, and an fp32 copy instead of a
    bf16 input.

    Args:
        input_is_saved: the input's storage is counted elsewhere.
    """
    statistics = rows * FP32_BYTES
    if kernels.fused_norm:
        return statistics + (0 if input_is_saved else rows * size * element)
    copy = 0 if input_is_saved and element == FP32_BYTES else rows * size * FP32_BYTES
    return statistics + copy + rows * size * FP32_BYTES


def modulated_norm_bytes(rows: int, sizes: Sizes) -> int:
    """Return the bytes that a norm of the residual stream saves (w1train.kernels.modulation), with or without modulation: its input, 1/rms
    (fp32) of each row, and its output, which is the input of the next linear layer. The plain twin on the CPU saves the same."""
    return rows * FP32_BYTES + 2 * rows * sizes.hidden * sizes.element


def branch_output_bytes(sizes: Sizes) -> int:
    """Return the bytes of the branch's output, which a gate saves for its own gradient; a plain sum saves nothing."""
    return sizes.residual if sizes.has_adaln else 0


def query_key_value_bytes(sizes: Sizes, kernels: Kernels) -> int:
    """Return the bytes that QK-norm and the rotary embedding save: an unfused rotary embedding saves cosines and sines [l, b, 1, d] for q
    and for k; QK-norm reads views of the projection, and a copy of q if heads are grouped."""
    total = 0 if kernels.fused_rotary else 4 * sizes.positions * sizes.channels * sizes.element
    if sizes.qk_norm:
        for width, copied in ((sizes.query, sizes.grouped_queries), (sizes.key, False)):
            rows = sizes.positions * width // sizes.channels
            total += norm_bytes(rows, sizes.channels, sizes.element, kernels, input_is_saved=not copied)
    return total


def attention_input_bytes(sizes: Sizes, kernels: Kernels, *, recomputed: bool) -> int:
    """Return the bytes of q, k and v that attention saves.

    One projection gives q, k and v in one storage. v is a view that keeps this storage; the rotary embedding makes new q and k.
    Context parallelism makes new k and v of all keys in one storage, or new q, k and v of other heads. The projection is then kept
    only by a QK-norm that saves its input and not a copy of the input. Recomputed attention saves its inputs from before the exchange.
    """
    projection = sizes.positions * (sizes.query + 2 * sizes.key)
    if sizes.travel is None or recomputed:
        return (projection + sizes.positions * (sizes.query + sizes.key)) * sizes.element
    if sizes.travel == "heads":
        exchanged = sizes.positions * (sizes.query + 2 * sizes.key)
    else:
        exchanged = sizes.positions * sizes.query + sizes.samples * sizes.keys * 2 * sizes.key
    norm_keeps_projection = sizes.qk_norm and (kernels.fused_norm or sizes.element == FP32_BYTES)
    return (exchanged + (projection if norm_keeps_projection else 0)) * sizes.element


def core_attention_bytes(sizes: Sizes) -> int:
    """Return the bytes that only the core attention saves, and that selective recomputation does not keep.

    These are the log-sum-exp (fp32, one number for each head and position) and, with a mask, its additive form [b, 1, q, k], which every
    layer makes for itself. The output is the input of the next linear layer; where ranks exchange heads, it is a separate tensor.

    Grouped queries with a mask are assumed to run fused as well; this has not been checked on a GPU.
    """
    mask = sizes.samples * sizes.rows * sizes.keys * sizes.element if sizes.masked else 0
    output = sizes.positions * sizes.query * sizes.element if sizes.travel == "heads" else 0
    return sizes.positions * sizes.heads * FP32_BYTES + mask + output


def mlp_bytes(sizes: Sizes, kernels: Kernels, ffn: int) -> int:
    """Return the bytes that SwiGLU saves: [gate, up] of width 2f, and the product of width f for the second linear layer."""
    widths_saved = 3 if kernels.fused_swiglu else 5
    return sizes.positions * widths_saved * ffn * sizes.element


def modulation_bytes(sizes: Sizes, num_vectors: int) -> int:
    """Return the bytes of SiLU of the condition [g, c] and of the table of vectors [g, num_vectors h]."""
    if not sizes.has_adaln:
        return 0
    return sizes.segments * (sizes.condition + num_vectors * sizes.hidden) * sizes.element


def layer_bytes(
    sizes: Sizes, kernels: Kernels, *, has_experts: bool, recompute_attention: bool = False, recompute_experts: bool = False
) -> int:
    """Return the bytes that a whole layer saves."""
    attention_output = sizes.positions * sizes.query * sizes.element
    total = modulation_bytes(sizes, 6)
    total += 2 * (modulated_norm_bytes(sizes.residual_positions, sizes) + branch_output_bytes(sizes))
    total += query_key_value_bytes(sizes, kernels) + attention_output
    total += attention_input_bytes(sizes, kernels, recomputed=recompute_attention)
    total += 0 if recompute_attention else core_attention_bytes(sizes)
    if not has_experts:
        return total + mlp_bytes(sizes, kernels, sizes.ffn)
    assert sizes.experts is not None
    if recompute_experts:
        return total  # the input of the experts, which is kept, is the output of the norm
    return total + expert_bytes(sizes.experts) + mlp_bytes(sizes, kernels, sizes.experts.shared_inner)


def layers_bytes(sizes: Sizes, kernels: Kernels, layout: Layout, num_layers: int, num_with_experts: int) -> int:
    """Return the bytes that all layers of a chunk save. Full recomputation saves the input of each group of layers, and one copy
    of the rotary angles (fp32)."""
    angles = sizes.positions * sizes.channels * FP32_BYTES
    if layout.recompute == "full":
        num_groups = -(-num_layers // layout.recompute_num_layers)
        return num_groups * sizes.residual + angles
    total = angles if kernels.fused_rotary else 0
    for count, has_experts in ((num_layers - num_with_experts, False), (num_with_experts, True)):
        if count:
            total += count * layer_bytes(
                sizes,
                kernels,
                has_experts=has_experts,
                recompute_attention=layout.recompute == "selective",
                recompute_experts=layout.repeats_experts,
            )
    return total


def conditioning_bytes(sizes: Sizes) -> int:
    """Return the bytes of the timestep MLP (sinusoid [g, f], two hidden layers and the condition [g, c]) and of each position's segment."""
    if not sizes.has_adaln:
        return 0
    index = sizes.residual_positions * _INT64_BYTES if sizes.segment_indexed else 0
    return sizes.segments * (sizes.frequencies + 3 * sizes.condition) * sizes.element + index


def head_bytes(sizes: Sizes) -> int:
    """Return the bytes that the head saves at the positions with logits: index, norm, modulation, the head's input, and the
    cross-entropy's probabilities in fp32, which are a copy of bf16 logits and overwrite fp32 logits. A loss in chunks saves three
    numbers for each row instead of the probabilities."""
    rows = sizes.num_logits
    indices = rows * _INT64_BYTES * (3 if sizes.has_adaln else 2)
    inputs = modulated_norm_bytes(rows, sizes)
    weights = rows * FP32_BYTES
    # A byte for each row tells whether another rank has the target.
    of_softmax = rows * (sizes.vocabulary * FP32_BYTES + 1) if sizes.loss_chunk is None else 3 * rows * FP32_BYTES
    return indices + inputs + modulation_bytes(sizes, 2) + of_softmax + weights


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Bytes that one chunk saves for one micro-batch."""

    layers: int
    conditioning: int
    embedding: int
    head: int

    @property
    def total(self) -> int:
        return self.layers + self.conditioning + self.embedding + self.head


def chunk_activation_bytes(sizes: Sizes, kernels: Kernels, layout: Layout, chunk: Chunk) -> ActivationBytes:
    """Return the bytes that a chunk saves for one micro-batch."""
    return ActivationBytes(
        layers=layers_bytes(sizes, kernels, layout, chunk.num_layers, chunk.num_expert_layers),
        conditioning=conditioning_bytes(sizes),
        embedding=sizes.positions * _INT64_BYTES if chunk.has_embedding else 0,
        head=head_bytes(sizes) if chunk.has_head else 0,
    )


def logits_bytes(sizes: Sizes) -> int:
    """Return the bytes of the logits that are in memory at once, in the run's precision. If the loss is computed in chunks, this also
    counts the gradients of the head's input for all rows."""
    if sizes.loss_chunk is None:
        return sizes.num_logits * sizes.vocabulary * sizes.element
    chunk = min(sizes.loss_chunk, sizes.num_logits)
    return (chunk * sizes.vocabulary + sizes.num_logits * sizes.hidden) * sizes.element


def working_bytes(sizes: Sizes, kernels: Kernels, layout: Layout, chunk: Chunk, largest_parameter: int) -> int:
    """Return the largest number of bytes in use besides saved tensors, while one micro-batch runs.

    Besides the probabilities, the last stage holds the logits or their gradient in the run's precision. With a loss in chunks, it holds the
    logits of a chunk, and the gradient of the head's input. A fully recomputed group holds its layers' activations again. The rows of one
    layer with experts travel at a time. The dense mask (a byte for each pair) lives as long as its micro-batch. A stage's output waits for
    its gradient. The gradient of the largest parameter (``largest_parameter`` elements) exists in the run's precision before it is added to
    the fp32 buffer.
    """
    has_experts = chunk.num_expert_layers > 0
    logits = logits_bytes(sizes) if chunk.has_head else sizes.residual
    mask = sizes.samples * sizes.rows * sizes.keys if sizes.masked else 0
    recomputed = 0
    if layout.recompute == "full":
        recomputed = min(layout.recompute_num_layers, chunk.num_layers) * layer_bytes(sizes, kernels, has_experts=has_experts)
    elif layout.recompute == "selective":
        recomputed = core_attention_bytes(sizes)
        if has_experts and sizes.experts is not None and layout.repeats_experts:
            recomputed = max(recomputed, expert_bytes(sizes.experts) + mlp_bytes(sizes, kernels, sizes.experts.shared_inner))
    if has_experts and sizes.experts is not None:
        recomputed += dispatch_bytes(sizes.experts)
    return max(logits, recomputed) + mask + largest_parameter * sizes.element
