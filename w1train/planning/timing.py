"""Seconds of a step, from counted work and assumed efficiencies.

The stages run their micro-batches one after another. No overlap is assumed, although ``parallel.overlap_*`` runs collectives during
computation: in this respect the time is an upper bound. The work that a rank does once a step (gradients, optimizer) is added.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from w1train.config.schema import Config
from w1train.model.flops import FlopsByPart, model_flops, num_expert_layers
from w1train.planning.activations import Sizes
from w1train.planning.assumptions import Assumptions, Device
from w1train.planning.layout import Chunk, Layout, Precision
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
    expert_parallel: float
    """The exchange of the rows of tokens with the ranks of their experts."""
    pipeline_sends: float
    gradients_and_optimizer: float
    """Memory passes over gradients and optimizer states, and Muon's orthogonalizations, once a step."""
    data_parallel: float
    """Collectives of gradients and parameters, once a step."""

    @property
    def per_micro_batches(self) -> float:
        """Seconds of all micro-batches together."""
        communication = self.tensor_parallel + self.context_parallel + self.expert_parallel + self.pipeline_sends
        return self.matmul + self.attention + self.elementwise + communication

    @property
    def total(self) -> float:
        return sum(astuple(self))


def chunk_flops(config: Config, layout: Layout, work: Workload, chunk: Chunk, num_logits: int) -> FlopsByPart:
    """Return the model FLOPs of one micro-batch in one chunk on one rank.

    Every tensor- and context-parallel rank repeats adaLN and the timestep MLP.
    """
    model, samples = config.model, layout.micro_batch_size
    whole = model_flops(
        model,
        num_tokens=samples * work.num_positions,
        visible_pairs=samples * work.visible_pairs,
        num_logits=num_logits,
        num_segments=samples * work.num_segments + work.num_clean_segments,
        adapters=config.adapters,
    )

    def share(flops: int, layers_here: int, layers: int) -> int:
        return flops * layers_here // (max(1, layers) * layout.tensor * layout.context)

    every = (chunk.num_layers, model.num_layers)
    with_experts = (chunk.num_expert_layers, num_expert_layers(model))
    return FlopsByPart(
        attention_projections=share(whole.attention_projections, *every),
        attention_core=share(whole.attention_core, *every),
        mlp=share(whole.mlp, every[0] - with_experts[0], every[1] - with_experts[1]),
        router=share(whole.router, *with_experts),
        experts=share(whole.experts, *with_experts),
        shared_experts=share(whole.shared_experts, *with_experts),
        adaln=whole.adaln * chunk.num_layers // model.num_layers,
        timestep_mlp=whole.timestep_mlp,
        output_head=whole.output_head // (layout.tensor * layout.context) if chunk.has_head else 0,
        adapters=share(whole.adapters, *every),
    )


def compute_seconds(
    flops: FlopsByPart, sizes: Sizes, layout: Layout, work: Workload, device: Device, assumptions: Assumptions
) -> tuple[float, float]:
    """Return the seconds of (linear layers, attention) of one micro-batch, without the routed experts (``expert_seconds``).

    Recomputation repeats the forward pass, which is a third of the work. With a dense mask, the kernel computes every pair of a row and a
    key that it gets.
    """
    peak = device.peak_tflops * 1e12
    repeated = {"none": (3, 3), "selective": (3, 4), "full": (4, 4)}[layout.recompute]
    in_layers: float = flops.attention_projections + flops.mlp + flops.adaln + flops.adapters
    of_experts = 4 / 3 if layout.repeats_experts else 1.0
    # A loss in chunks computes its logits twice.
    outside = flops.timestep_mlp + flops.output_head * (4 if layout.loss_chunk_size is not None else 3) / 3
    in_layers = in_layers * repeated[0] / 3 + (flops.router + flops.shared_experts) * of_experts
    matmul = (in_layers + outside) / (peak * assumptions.matmul_efficiency)
    pairs, efficiency = flops.attention_core * repeated[1] / 3, assumptions.attention_efficiency
    if work.is_masked:
        pairs, efficiency = pairs * work.num_positions * sizes.keys / work.visible_pairs, assumptions.masked_attention_efficiency
    return matmul, pairs / (peak * efficiency)


def layer_elementwise_bytes(sizes: Sizes, *, has_experts: bool) -> int:
    """Return the bytes that a layer's element-wise kernels read and write, forward and backward, counted from the code.

    In units of a residual tensor, for each of the two branches: modulated RMSNorm 2 + 3, gated residual 3 + 3, sum of the two gradients
    3; without adaLN the residual sum 3 replaces the gate. The rotary embedding passes 2 + 2 times over q and k; SwiGLU 3 + 5 times over a
    tensor of its width. These are the numbers of the fused kernels; unfused choices of ``kernels`` cost more, which is not counted.

    Experts: a row is copied to its place among the rows that are sent, and once more to be sorted by expert, and both are undone in its
    output. A copy passes 2 times forward and 2 times backward. Their SwiGLU is a chain of 12 + 20 passes. The scores of all experts pass
    about 10 times in fp32.
    """
    branch = 14 if sizes.has_adaln else 11
    rotary = 4 * sizes.positions * (sizes.query + sizes.key) * sizes.element
    total, experts = 2 * branch * sizes.residual + rotary, sizes.experts
    if not has_experts or experts is None:
        return total + 8 * sizes.positions * sizes.ffn * sizes.element
    copies = 8 * (experts.routed + experts.rows) * experts.row_bytes(experts.hidden)
    inside = 32 * experts.rows * experts.row_bytes(experts.inner) + 8 * sizes.positions * experts.shared_inner * sizes.element
    return total + copies + inside + 10 * experts.tokens * experts.num_experts * FP32_BYTES


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


def elementwise_bytes(sizes: Sizes, layout: Layout, chunk: Chunk, num_parameters: int) -> int:
    """Return the bytes of the element-wise kernels in one micro-batch.

    They belong to the layers (full recomputation repeats a third of forward and backward), the head, and the addition of every parameter's
    gradient to the fp32 buffer.
    """
    layers = (chunk.num_layers - chunk.num_expert_layers) * layer_elementwise_bytes(sizes, has_experts=False)
    layers += chunk.num_expert_layers * layer_elementwise_bytes(sizes, has_experts=True)
    layers += layers // 3 if layout.recompute == "full" else 0
    gradients = num_parameters * (sizes.element + 2 * FP32_BYTES)
    return layers + gradients + (head_elementwise_bytes(sizes) if chunk.has_head else 0)


def optimizer_pass_bytes(state: StateBytes, precision: Precision) -> int:
    """Return the bytes that the optimizer reads and writes once a step.

    Zeroing and dividing the gradient buffer takes 3 passes, norm and clipping of this rank's share 3 more. The update reads the share once,
    and reads and writes master and moments.
    """
    share = FP32_BYTES * state.num_updated
    masters_and_moments = state.optimizer + (share if precision == "fp32" else 0)
    return 3 * state.gradients + 4 * share + 2 * masters_and_moments
