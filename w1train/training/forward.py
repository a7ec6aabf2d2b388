"""One micro-batch through the model: corruption, forward pass, loss; in the form megatron-core's schedules call it.

Shapes: b = samples, l = sequence_length, m = positions where a loss is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from w1train.attention.plan import plan_attention
from w1train.attention.visibility import document_visibility
from w1train.config.schema import Config
from w1train.diffusion.corruption import NoisyBatch
from w1train.diffusion.loss import LossSums, denominator, diffusion_loss
from w1train.model.transformer import DiffusionTransformer, ModelInputs


@dataclass(slots=True, frozen=True)
class StepWork:
    """What a step computed: the arguments of its FLOP count, summed over the global batch."""

    num_positions: int
    visible_pairs: int
    num_logits: int
    num_segments: int


def model_inputs(noisy: NoisyBatch, timestep_per: str) -> ModelInputs:
    """A corrupted batch as the model takes it."""
    return ModelInputs(
        input_ids=noisy.input_ids,
        positions=noisy.positions,
        attention_plan=plan_attention(document_visibility(noisy.document_ids)),
        segment_timesteps=noisy.segment_timesteps,
        segment_index=None if timestep_per == "sequence" else noisy.segment_index,
        logit_positions=noisy.loss_mask.flatten().nonzero()[:, 0],
    )


def run_micro_batches(
    config: Config, chunks: list[torch.nn.Module], batches: Iterator[NoisyBatch], num_micro_batches: int, *, training: bool
) -> tuple[LossSums, StepWork]:
    """Forward (and in training backward) over the micro-batches of this rank, through megatron-core's schedule.

    Gradients are left divided by the objective's denominator over the global batch.

    Returns:
        Sums over the whole global batch, the same on every rank.
    """
    forward_step = partial(_forward_step, config)
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=chunks,
        num_microbatches=num_micro_batches,
        seq_length=config.data.sequence_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=not training,
    )
    return _sum_over_ranks(results, config.logging.num_t_bins)


def _forward_step(config: Config, batches: Iterator[NoisyBatch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], tuple]]:
    noisy = next(batches)
    inputs = model_inputs(noisy, config.diffusion.timestep_per)
    return model(inputs), partial(_loss, config, noisy, inputs)


def _loss(config: Config, noisy: NoisyBatch, inputs: ModelInputs, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What megatron-core's schedule expects: the sum to differentiate, its denominator, and what is kept."""
    targets = noisy.targets.flatten()[inputs.logit_positions]
    # [m, 1, v]: megatron-core's cross-entropy wants [sequence, batch, vocabulary].
    cross_entropy = vocab_parallel_cross_entropy(logits[:, None], targets[:, None])[:, 0]
    weighted, sums = diffusion_loss(cross_entropy, noisy, config.diffusion, config.logging.num_t_bins)
    plan = inputs.attention_plan
    work = [noisy.input_ids.numel(), plan.visibility.num_visible_pairs(), len(targets), len(noisy.segment_timesteps)]
    kept = torch.cat([sums.values, torch.stack([torch.as_tensor(value, device=weighted.device).double() for value in work])])
    return weighted, denominator(config.diffusion, noisy).to(torch.int), kept


def _sum_over_ranks(results: list[Tensor], num_t_bins: int) -> tuple[LossSums, StepWork]:
    """Add the last stage's micro-batches, then data-parallel ranks, and tell the other stages."""
    size = LossSums.NUM_SCALARS + 2 * num_t_bins + 4
    device = torch.cuda.current_device()
    total = torch.stack(results).sum(dim=0) if results else torch.zeros(size, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.broadcast(
        total,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return LossSums(total[:-4], num_t_bins), StepWork(*(int(value) for value in total[-4:].tolist()))


def bare_module(chunk: torch.nn.Module) -> DiffusionTransformer:
    """The stage inside the data-parallel wrapper, or the stage itself."""
    return getattr(chunk, "module", chunk)
