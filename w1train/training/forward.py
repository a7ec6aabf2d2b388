"""One micro-batch through the model: forward pass and loss, in the form megatron-core's schedules call it.

Shapes: m = positions where a loss is taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from w1train.config.schema import Config
from w1train.diffusion.corruption import NoisyBatch
from w1train.model.row_terms import CrossEntropy
from w1train.objectives.description import num_streams
from w1train.objectives.likelihood import LossSums, denominator, diffusion_loss
from w1train.runtime.pulse import beat
from w1train.runtime.streams import hand_over, side_stream
from w1train.training.inputs import RankInputs, rank_inputs


@dataclass(slots=True, frozen=True)
class StepWork:
    """What a step computed, over the global batch: the arguments of its FLOP count, and how evenly it was spread."""

    num_positions: int
    visible_pairs: int
    num_logits: int
    num_segments: int
    context_balance: float
    """max / mean visible pairs over context-parallel ranks, mean over micro-batches."""


_NUM_WORK = 6

type Prepared = tuple[RankInputs, Tensor, Tensor]
"""Of a micro-batch: inputs, targets at ``logit_positions``, and _work's numbers."""


def run_micro_batches(
    config: Config, chunks: list[torch.nn.Module], batches: Iterator[NoisyBatch], num_micro_batches: int, *, training: bool
) -> tuple[LossSums, StepWork]:
    """Forward (and in training backward) over the micro-batches of this rank, through megatron-core's schedule.

    Gradients are left divided by the objective's denominator over the global batch.

    Returns:
        Sums over the whole global batch, the same on every rank.
    """
    iterators = _inputs_of_chunks(config, batches, num_micro_batches, len(chunks))
    if torch.cuda.is_available():
        # Once a step: batches that lie on the GPU already (validation's) were put there by the model's stream.
        _input_stream().wait_stream(torch.cuda.current_stream())
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, config),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=num_micro_batches,
        seq_length=num_streams(config) * config.data.sequence_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=not training,
    )
    return _sum_over_ranks(results, config.logging.num_t_bins)


def _forward_step(config: Config, prepared: Iterator[Prepared], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], tuple]]:
    beat()
    inputs, targets, work = next(prepared)
    return model(inputs.model, (CrossEntropy(targets),)), partial(_loss, config, inputs, work)


def _inputs_of_chunks(config: Config, batches: Iterator[NoisyBatch], num_micro_batches: int, num_chunks: int) -> list[Iterator[Prepared]]:
    """For each chunk of a virtual pipeline every micro-batch: all of them share its visibility and the attention's plan. Not
    itertools.tee, which keeps up to 57 items that every chunk has had, and their masks would fill the GPU."""
    waiting: list[deque[Prepared]] = [deque() for _ in range(num_chunks)]

    def draw(own: deque[Prepared]) -> Iterator[Prepared]:
        for _ in range(num_micro_batches):
            if not own:
                prepared = _next_inputs(config, batches)
                for each in waiting:
                    each.append(prepared)
                del prepared
            yield own.popleft()

    return [draw(own) for own in waiting]


def _next_inputs(config: Config, batches: Iterator[NoisyBatch]) -> Prepared:
    """The next micro-batch's inputs, targets and work. Corruption, visibility, the attention's plan and the choice of where losses are
    taken ask the GPU for sizes (of segments, of masked tokens, of tiles). On the model's stream each answer would come after the backward
    pass that is under way, and the GPU would then wait for the host; on a stream of their own they wait for themselves alone."""
    if not torch.cuda.is_available():
        return _prepare(next(batches), config)
    stream = _input_stream()
    with torch.cuda.stream(stream):
        prepared = _prepare(next(batches), config)
    hand_over(prepared, stream)
    return prepared


def _prepare(noisy: NoisyBatch, config: Config) -> Prepared:
    inputs = rank_inputs(noisy, config)
    inputs.noisy.loss_timesteps_and_weights()  # picked here, for the loss to find
    return inputs, inputs.targets, _work(inputs)


def _input_stream() -> torch.cuda.Stream:
    return side_stream("inputs", torch.device("cuda", torch.cuda.current_device()))


def _loss(config: Config, inputs: RankInputs, work: Tensor, terms: tuple[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What megatron-core's schedule expects: the sum to differentiate, its denominator, and what is kept.

    ``terms``: the cross-entropy, float32 [m], the noisy stream's and behind them, where the objective has them, the clean stream's.
    """
    (cross_entropy,), noisy = terms, inputs.noisy
    num_noisy = len(noisy.loss_timesteps_and_weights()[0])
    of_clean = None if noisy.next_mask is None else cross_entropy[num_noisy:]
    weighted, sums = diffusion_loss(cross_entropy[:num_noisy], noisy, config.diffusion, config.logging.num_t_bins, of_clean)
    kept = torch.cat([sums.values, work])
    return weighted, denominator(config.diffusion, noisy).to(torch.int), kept


def _work(inputs: RankInputs) -> Tensor:
    """float64 [_NUM_WORK], StepWork's numbers as sums (the last one with its count)."""
    model, plan = inputs.model, inputs.model.attention_plan
    pairs = plan.visibility.num_visible_pairs().double()
    segments = len(model.segment_timesteps)
    if plan.exchange is not None:
        # Ranks that exchange heads see all pairs, each for its share of the heads; modulation is replicated over ranks.
        ranks = parallel_state.get_context_parallel_world_size()
        pairs = pairs / ranks if plan.exchange.travel == "heads" else pairs
        segments = segments if parallel_state.get_context_parallel_rank() == 0 else 0
    counts = [model.input_ids.numel(), len(model.logit_positions), segments, inputs.balance, 1.0]
    return torch.cat([pairs[None], torch.tensor(counts, dtype=torch.float64, device=pairs.device)])


def _sum_over_ranks(results: list[Tensor], num_t_bins: int) -> tuple[LossSums, StepWork]:
    """Add the last stage's micro-batches, then data- and context-parallel ranks, and tell the other stages."""
    size = LossSums.NUM_SCALARS + 2 * num_t_bins + _NUM_WORK
    device = torch.cuda.current_device()
    total = torch.stack(results).sum(dim=0) if results else torch.zeros(size, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.broadcast(
        total,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    pairs, positions, logits, segments, balance, count = total[-_NUM_WORK:].tolist()
    work = StepWork(round(positions), round(pairs), round(logits), round(segments), balance / max(count, 1.0))
    return LossSums(total[:-_NUM_WORK], num_t_bins), work
