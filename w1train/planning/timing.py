"""Seconds of a step, from counted work and assumed efficiencies.

The stages run their micro-batches one after another. No overlap is assumed, although ``parallel.overlap_*`` runs collectives during
computation: in this respect the time is an upper bound. The work that a rank does once a step (gradients, optimizer) is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from w1train.config.schema import ModelConfig
from w1train.model.flops import FlopsByPart, model_flops
from w1train.planning.activations import Sizes
from w1train.planning.assumptions import Assumptions, Device
from w1train.planning.layout import Chunk, Layout, Precision
from w1train.planning.parameters import Parameter
from w1train.planning.state import FP32_BYTES, StateBytes
from w1train.planning.workload import Workload


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds of one rank in a step, by part."""

    matmul: float
    attention: float
    elementwise: float
    tensor_parallel: float
    context_parallel: float
    pipeline_sends: float
    gradients_and_optimizer: float
    """Memory passes over gradients and optimizer states, and Muon's orthogonalizations, once a step."""
    data_parallel: float
    """Collectives of gradients and parameters, once a step."""

    @property
    def per_micro_batches(self) -> float:
        """Seconds of all micro-batches together."""
        return self.matmul + self.attention + self.elementwise + self.tensor_parallel + self.context_parallel + self.pipeline_sends

    @property
    def total(self) -> float:
        return sum(astuple(self))


def chunk_flops(model: ModelConfig, layout: Layout, work: Workload, chunk: Chunk, num_logits: int) -> FlopsByPart:
    """Return the model FLOPs of one micro-batch in one chunk on one rank.

    Every tensor- and context-parallel rank repeats adaLN and the timestep MLP.
    """
    samples = layout.micro_batch_size
    whole = model_flops(
        model,
        num_tokens=samples * work.num_positions,
        visible_pairs=samples * work.visible_pairs,
        num_logits=num_logits,
        num_segments=samples * work.num_segments + work.num_clean_segments,
    )

    def share(flops: int) -> int:
        return flops * chunk.num_layers // (model.num_layers * layout.tensor * layout.context)

    return FlopsByPart(
        attention_projections=share(whole.attention_projections),
        attention_core=share(whole.attention_core),
        mlp=share(whole.mlp),
        adaln=whole.adaln * chunk.num_layers // model.num_layers,
        timestep_mlp=whole.timestep_mlp,
        output_head=whole.output_head // (layout.tensor * layout.context) if chunk.has_head else 0,
    )


def compute_seconds(
    flops: FlopsByPart, sizes: Sizes, layout: Layout, work: Workload, device: Device, assumptions: Assumptions
) -> tuple[float, float]:
    """Return the seconds of (linear layers, attention) of one micro-batch.

    Recomputation repeats the forward pass, which is a third of the work. With a dense mask, the kernel computes every pair of a row and a
    key that it gets.
    """
    peak = device.peak_tflops * 1e12
    repeated = {"none": (3, 3), "selective": (3, 4), "full": (4, 4)}[layout.recompute]
    in_layers = flops.attention_projections + flops.mlp + flops.adaln
    # A loss in chunks computes its logits twice.
    outside = flops.timestep_mlp + flops.output_head * (4 if layout.loss_chunk_size is not None else 3) / 3
    matmul = (in_layers * repeated[0] / 3 + outside) / (peak * assumptions.matmul_efficiency)
    pairs, efficiency = flops.attention_core * repeated[1] / 3, assumptions.attention_efficiency
    if work.is_masked:
        pairs, efficiency = pairs * work.num_positions * sizes.keys / work.visible_pairs, assumptions.masked_attention_efficiency
    return matmul, pairs / (peak * efficiency)


def layer_elementwise_bytes(sizes: Sizes) -> int:
    """Return the bytes that a layer's element-wise kernels read and write, forward and backward, counted from the code.

    In units of a residual tensor, for each of the two branches: modulated RMSNorm 2 + 3, gated residual 3 + 3, sum of the two gradients
    3; without adaLN the residual sum 3 replaces the gate. The rotary embedding passes 2 + 2 times over q and k; SwiGLU 3 + 5 times over a
    tensor of its width. These are the numbers of the fused kernels; unfused choices of ``kernels`` cost more, which is not counted.
    """
    branch = 14 if sizes.has_adaln else 11
    rotary = 4 * sizes.positions * (sizes.query + sizes.key) * sizes.element
    return 2 * branch * sizes.residual + rotary + 8 * sizes.positions * sizes.ffn * sizes.element


def head_elementwise_bytes(sizes: Sizes) -> int:
    """Return the bytes that the cross-entropy reads and writes.

    Its passes over [m, v] convert, take the maximum, subtract, exponentiate, sum, divide, scale in fp32 and convert back. A loss in chunks
    reads the logits once for the sums, reads and writes them once for the gradient, and adds each chunk to the weight's fp32 gradient.
    """
    if sizes.loss_chunk is not None:
        num_chunks = -(-sizes.num_logits // sizes.loss_chunk)
        weight = num_chunks * sizes.vocabulary * sizes.hidden * 2 * FP32_BYTES
        return 3 * sizes.num_logits * sizes.vocabulary * sizes.element + weight
    per_logit = 2 * sizes.element + (1 + 1 + 2 + 2 + 1 + 2 + 2 + 1) * FP32_BYTES
    return sizes.num_logits * sizes.vocabulary * per_logit


def elementwise_bytes(sizes: Sizes, layout: Layout, chunk: Chunk, parameters: Sequence[Parameter]) -> int:
    """Return the bytes of the element-wise kernels in one micro-batch.

    They belong to the layers (full recomputation repeats a third of forward and backward), the head, and the addition of every parameter's
    gradient to the fp32 buffer.
    """
    layers = chunk.num_layers * layer_elementwise_bytes(sizes)
    layers += layers // 3 if layout.recompute == "full" else 0
    gradients = sum(parameter.numel for parameter in parameters) * (sizes.element + 2 * FP32_BYTES)
    return layers + gradients + (head_elementwise_bytes(sizes) if chunk.has_head else 0)


def optimizer_pass_bytes(state: StateBytes, precision: Precision) -> int:
    """Return the bytes that the optimizer reads and writes once a step.

    Zeroing and dividing the gradient buffer takes 3 passes, norm and clipping of this rank's share 3 more. The update reads the share once,
    and reads and writes master and moments.
    """
    share = FP32_BYTES * state.num_updated
    masters_and_moments = state.optimizer + (share if precision == "fp32" else 0)
    return 3 * state.gradients + 4 * share + 2 * masters_and_moments
