"""megatron-core's pipeline schedules: the order of the micro-batches' forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func


def run_schedule(
    forward_step: Callable[[Iterator[Any], torch.nn.Module], tuple[Any, Callable[..., Any]]],
    chunks: Sequence[torch.nn.Module],
    inputs: Sequence[Iterator[Any]],
    *,
    num_micro_batches: int,
    sequence_length: int,
    micro_batch_size: int,
    forward_only: bool,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Run micro-batches through this rank's chunks of the model, by the schedule of the layout (pipelined, interleaved or neither).

    Args:
        forward_step: a function of the chunk's inputs and the chunk. It returns the chunk's output, and the function that the last stage
            calls with this output.
        inputs: one iterator over the micro-batches for each chunk.
        sequence_length: positions of a micro-batch over all context-parallel ranks: the size of what stages send each other.
        forward_only: leaves out backward passes and the reduction of gradients.
        collect_non_loss_data: the results of the last stage's function are collected unchanged, and are not losses.

    Returns:
        One item for each micro-batch on the last pipeline stage, nothing on the other stages.
    """
    assert len(inputs) == len(chunks)
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=list(inputs) if len(chunks) > 1 else inputs[0],
        model=list(chunks),
        num_microbatches=num_micro_batches,
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )
    return results
