"""Forward pass and loss of the micro-batches, in the form in which megatron-core's schedules call them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from w1train.config.schema import Config
from w1train.diffusion.corruption import NoisyBatch
from w1train.engine.learned_rates import rates_with_gradients
from w1train.engine.pipeline import run_schedule
from w1train.model.noise_rates import NoiseRates
from w1train.model.row_terms import RowTerm
from w1train.objectives.description import num_streams
from w1train.objectives.named_sums import NamedSums, size_of
from w1train.objectives.objective import Objective, objective_at
from w1train.runtime.pulse import beat
from w1train.runtime.ranges import kernel_group, step_part
from w1train.runtime.streams import hand_over, side_stream
from w1train.training.inputs import RankInputs, rank_inputs


@dataclass(slots=True, frozen=True)
class StepWork:
    """The work of a step over the global batch: the arguments of its FLOP count, and how evenly the work was spread over ranks."""

    num_positions: int
    visible_pairs: int
    num_logits: int
    num_segments: int
    context_balance: float
    """The largest number of visible pairs of a context-parallel rank, divided by the mean over ranks; averaged over micro-batches."""


_NUM_WORK = 6
"""Numbers that ``_work`` returns."""

type Prepared = tuple[RankInputs, dict[str, RowTerm], Tensor]
"""A micro-batch's inputs, what the objective asks of the logits at ``logit_positions``, and the numbers of ``_work``."""


def run_micro_batches(
    config: Config, chunks: list[torch.nn.Module], batches: Iterator[NoisyBatch], num_micro_batches: int, *, training: bool
) -> tuple[dict[str, Any], StepWork]:
    """Run the forward pass (and in training the backward pass) over the micro-batches of this rank, through megatron-core's schedule.

    Gradients are left divided by the objective's denominator over the global batch.

    Returns:
        Metrics of the whole global batch by their names in records, and the work of all ranks; the same on every rank.
    """
    sums, work = sum_micro_batches(config, chunks, batches, num_micro_batches, training=training)
    return objective_at(config).metrics(sums), work


def sum_micro_batches(
    config: Config, chunks: list[torch.nn.Module], batches: Iterator[NoisyBatch], num_micro_batches: int, *, training: bool
) -> tuple[NamedSums, StepWork]:
    """Do what ``run_micro_batches`` does, and return the objective's sums over the global batch instead of its metrics."""
    iterators = _inputs_of_chunks(config, batches, num_micro_batches, len(chunks), rates_with_gradients(chunks))
    if torch.cuda.is_available():
        # Batches that are on the GPU already (those of validation) were put there by the model's stream. One wait per step is enough.
        _input_stream().wait_stream(torch.cuda.current_stream())
    results = run_schedule(
        partial(_forward_step, config),
        chunks,
        iterators,
        num_micro_batches=num_micro_batches,
        sequence_length=num_streams(config) * config.data.sequence_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=not training,
    )
    return _sum_over_ranks(results, objective_at(config))


def _forward_step(config: Config, prepared: Iterator[Prepared], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], tuple]]:
    beat()
    inputs, row_terms, work = next(prepared)
    return model(inputs.model, tuple(row_terms.values())), partial(_loss, config, inputs, work, tuple(row_terms))


def _inputs_of_chunks(
    config: Config, batches: Iterator[NoisyBatch], num_micro_batches: int, num_chunks: int, live_rates: NoiseRates | None = None
) -> list[Iterator[Prepared]]:
    """Return an iterator over all micro-batches for each chunk of a virtual pipeline. The chunks share each micro-batch's visibility and
    plan of attention. itertools.tee would keep up to 57 items that all chunks have used already, and their masks would fill the GPU."""
    waiting: list[deque[Prepared]] = [deque() for _ in range(num_chunks)]

    def draw(own: deque[Prepared]) -> Iterator[Prepared]:
        for _ in range(num_micro_batches):
            if not own:
                prepared = _next_inputs(config, batches, live_rates)
                for each in waiting:
                    each.append(prepared)
                del prepared
            yield own.popleft()

    return [draw(own) for own in waiting]


@step_part("data")
def _next_inputs(config: Config, batches: Iterator[NoisyBatch], live_rates: NoiseRates | None = None) -> Prepared:
    """Return the next micro-batch's inputs, row terms and work.

    Corruption, visibility, the plan of attention and the choice of loss rows ask the GPU for sizes (of segments, of masked tokens, of
    tiles). On the model's stream each answer would come after the backward pass that is under way, and the GPU would then wait for the
    host. On a stream of their own they do not wait for other work.

    Args:
        live_rates: the learned rates of noise on the last pipeline stage, where the loss has a gradient for them. Each micro-batch has a
            graph of its own, because the backward pass frees it.
    """
    rates = None if live_rates is None else live_rates()
    if not torch.cuda.is_available():
        return _prepare(next(batches), config, rates)
    stream = _input_stream()
    with torch.cuda.stream(stream):
        prepared = _prepare(next(batches), config, rates)
    hand_over(prepared, stream)
    return prepared


def _prepare(noisy: NoisyBatch, config: Config, rates: Tensor | None = None) -> Prepared:
    if rates is not None:
        noisy = replace(noisy, noise_rates=rates)
    inputs = rank_inputs(noisy, config)
    return inputs, objective_at(config).row_terms(inputs.rows), _work(inputs)


def _input_stream() -> torch.cuda.Stream:
    return side_stream("inputs", torch.device("cuda", torch.cuda.current_device()))


@step_part("forward")
@kernel_group("loss and head")
def _loss(
    config: Config, inputs: RankInputs, work: Tensor, names: Sequence[str], values: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what megatron-core's schedule expects: the sum to differentiate, its denominator, and the values to keep.

    Args:
        names, values: what the objective asked of the logits, at the rows of ``inputs.rows``.
    """
    objective = objective_at(config)
    weighted, sums = objective.loss(dict(zip(names, values, strict=True)), inputs.rows)
    return weighted, sums[objective.normalizer].to(torch.int), torch.cat([sums.values, work])


def _work(inputs: RankInputs) -> Tensor:
    """Return the numbers of StepWork as sums, float64 [_NUM_WORK]; the last two are the sum of balances and the number of micro-batches."""
    model, plan = inputs.model, inputs.model.attention_plan
    pairs = plan.visibility.num_visible_pairs().double()
    segments = len(model.segment_timesteps)
    if plan.exchange is not None:
        # Ranks that exchange heads see all pairs, each rank for its share of the heads. Modulation is replicated over ranks.
        ranks = parallel_state.get_context_parallel_world_size()
        pairs = pairs / ranks if plan.exchange.travel == "heads" else pairs
        segments = segments if parallel_state.get_context_parallel_rank() == 0 else 0
    counts = [model.input_ids.numel(), len(model.logit_positions), segments, inputs.balance, 1.0]
    return torch.cat([pairs[None], torch.tensor(counts, dtype=torch.float64, device=pairs.device)])


def _sum_over_ranks(results: list[Tensor], objective: Objective) -> tuple[NamedSums, StepWork]:
    """Add the sums of the last stage's micro-batches and of data- and context-parallel ranks, and send them to the other stages."""
    layout = objective.layout
    device = torch.cuda.current_device()
    total = torch.stack(results).sum(dim=0) if results else torch.zeros(size_of(layout) + _NUM_WORK, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.broadcast(
        total,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    pairs, positions, logits, segments, balance, count = total[-_NUM_WORK:].tolist()
    work = StepWork(round(positions), round(pairs), round(logits), round(segments), balance / max(count, 1.0))
    return NamedSums(total[:-_NUM_WORK], layout), work
