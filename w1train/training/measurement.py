"""Sums over the whole global batch that a loss needs before its backward pass, from a pass of the model without gradients.

The gradient of some objectives depends on sums that only the model's outputs give: on the number of tokens that the model predicts
right, or on the likelihoods of both sides of a preference. The micro-batches of a step cannot know such a sum before the last of them
has run. So the step's micro-batches are kept, the model runs over them once without gradients, and each micro-batch of the pass with
gradients gets the sums. This is exact in every layout, for any number of micro-batches, and costs one more forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice

import torch

from w1train.config.schema import Config
from w1train.diffusion.corruption import NoisyBatch
from w1train.objectives.objective import objective_of
from w1train.training.forward import sum_micro_batches


def measured(config: Config, chunks: list[torch.nn.Module], batches: Iterator[NoisyBatch], num_micro_batches: int) -> Iterator[NoisyBatch]:
    """Return the micro-batches of a step with the sums that the objective needs; the iterator itself if the objective needs no such sums.
    Every rank calls this."""
    objective = objective_of(config.diffusion, config.logging.num_t_bins)
    if not objective.is_measured:
        return batches
    kept = list(islice(batches, num_micro_batches))
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        sums, _ = sum_micro_batches(config, chunks, iter(kept), num_micro_batches, training=False)
    for chunk in chunks:
        chunk.train()
    found = {name: sums[name] for name in sums.layout}
    return iter([dataclasses.replace(batch, measured=found) for batch in kept])
