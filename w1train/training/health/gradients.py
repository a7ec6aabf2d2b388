"""Gradients between the backward pass and the optimizer: their norm before anything is updated, and whose own were no numbers."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from w1train.model.initialization import global_named_parameters


@torch.no_grad()
def prepare_gradients(optimizer: MegatronOptimizer) -> Any:
    """What the optimizer's step does first: gradients into the form it wants, and their norm over all ranks, which is the same on each.
    Nothing is updated."""
    # Others take their norm inside clip_grad_norm, and would take it twice.
    assert isinstance(optimizer, ChainedOptimizer), type(optimizer)
    found_overflow = optimizer.prepare_grads()
    assert not found_overflow, "only fp16 scales its loss"
    return optimizer.get_grad_norm()


def step_with_prepared_gradients(optimizer: MegatronOptimizer, grad_norm: Any) -> None:
    """The rest of the optimizer's step (clipping, update), with what :func:`prepare_gradients` gave.

    It is megatron-core's own ``step``, whose first two calls find their answers ready: so it cannot differ from it in a bit.
    """
    optimizer.prepare_grads = lambda: False
    optimizer.get_grad_norm = lambda: grad_norm
    try:
        optimizer.step()
    finally:
        del optimizer.prepare_grads, optimizer.get_grad_norm


class LocalGradients:
    """Whether this rank's own gradients were numbers before they were added to those of other ranks, after which nobody can tell."""

    def __init__(self, chunks: Sequence[DistributedDataParallel], *, enabled: bool) -> None:
        """Wraps the call that sends a bucket, on every rank."""
        self._sums: list[Tensor] = []
        self._groups = [group for chunk in chunks for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
        self.enabled = enabled
        for group in self._groups if enabled else ():
            group.start_grad_sync = self._noted(group)

    def begin(self) -> None:
        """A step begins."""
        self._sums.clear()

    def _noted(self, group: Any) -> Any:
        start = group.start_grad_sync

        @torch.no_grad()
        def noted(*arguments: Any, **keywords: Any) -> Any:
            # A sum is no number if a term is none. Not read here: the host does not wait for it.
            self._sums.extend(bucket.grad_data.sum() for bucket in group.buckets)
            return start(*arguments, **keywords)

        return noted

    def nonfinite_ranks(self) -> list[str]:
        """The ranks, with their machines, whose own gradients of this step were no numbers. Called on every rank."""
        is_finite = all(torch.isfinite(total).item() for total in self._sums)
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, None if is_finite else f"rank {dist.get_rank()} on {socket.gethostname()}")
        return [name for name in found if name is not None]


@torch.no_grad()
def nonfinite_parameters(chunks: Sequence[DistributedDataParallel]) -> list[str]:
    """Names of this rank's parameters whose gradients, as far as they are here, are no numbers."""
    return [
        name
        for chunk in chunks
        for name, parameter in global_named_parameters(chunk.module)
        if (gradient := getattr(parameter, "main_grad", None)) is not None and not torch.isfinite(gradient).all()
    ]
