"""Sums over the whole global batch that a loss needs before its backward pass, from passes of models without gradients.

The gradient of some objectives depends on sums that only the model's outputs give: on the number of tokens that the model predicts
right, or on the likelihoods of both sides of a preference. The micro-batches of a step cannot know such a sum before the last of them
has run. So the step's micro-batches are kept, the model runs over them once without gradients, and each micro-batch of the pass with
gradients gets the sums. This is exact in every layout, for any number of micro-batches, and costs one more forward pass. A reference costs
another forward pass over the same noisy micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.config.schema import Config
from w1train.diffusion.corruption import NoisyBatch
from w1train.objectives.objective import objective_at
from w1train.training.companions import Companion, require_unchanged
from w1train.training.forward import sum_micro_batches
from w1train.training.health.bad_batches import keep


def measured(
    config: Config,
    chunks: list[torch.nn.Module],
    batches: Iterator[NoisyBatch],
    num_micro_batches: int,
    reference: Companion | None = None,
) -> Iterator[NoisyBatch]:
    """Return the micro-batches of a step with the sums that the objective needs; the iterator itself if the objective needs no such sums.
    The names of the reference's sums begin with "reference_". Every rank calls this."""
    if not objective_at(config).is_measured:
        return batches
    # The first pass takes the micro-batches from the iterator, so that they are corrupted on the stream of inputs, beside the model.
    kept: list[NoisyBatch] = []
    for chunk in chunks:
        chunk.eval()
    found = _sums(config, chunks, keep(batches, kept), num_micro_batches)
    for chunk in chunks:
        chunk.train()
    if reference is not None:
        with reference.active() as frozen:
            found |= {f"reference_{name}": value for name, value in _sums(config, frozen, iter(kept), len(kept)).items()}
    return iter([dataclasses.replace(batch, measured=found) for batch in kept])


@dataclass(frozen=True, slots=True)
class Measurement:
    """The passes without gradients before the steps of a run, and the reference that takes part in them."""

    reference: Companion | None
    """The frozen model that preferences are compared with; None for a run without preferences."""

    def before_step(
        self, config: Config, chunks: list[torch.nn.Module], batches: Iterator[NoisyBatch], num_micro_batches: int
    ) -> Iterator[NoisyBatch]:
        """Return ``measured`` of the micro-batches of a step."""
        return measured(config, chunks, batches, num_micro_batches, self.reference)

    def require_unchanged_reference(self) -> None:
        """Compare the weights of the reference, if there is one, with those that it began with. Every rank calls this.

        Raises:
            RuntimeError: as ``require_unchanged``.
        """
        if self.reference is not None:
            require_unchanged(self.reference)


@torch.no_grad()
def _sums(config: Config, chunks: Sequence[torch.nn.Module], batches: Iterator[NoisyBatch], num_micro_batches: int) -> dict[str, Tensor]:
    """Return a model's sums over the global batch, by name."""
    sums, _ = sum_micro_batches(config, list(chunks), batches, num_micro_batches, training=False)
    return {name: sums[name] for name in sums.layout}
