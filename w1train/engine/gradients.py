"""Gradients between the backward pass and the optimizer: their norm before anything is updated, and whose own were no numbers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from w1train.engine.gradient_hooks import GradientHooks
from w1train.model.initialization import global_named_parameters
from w1train.runtime.ranges import kernel_group, step_part


@step_part("optimizer")
@kernel_group("optimizer")
@torch.no_grad()
def prepare_gradients(optimizer: MegatronOptimizer) -> Any:
    """What the optimizer's step does first: gradients into the form it wants, and their norm over all ranks, which is the same on each.
    Nothing is updated."""
    # Others take their norm inside clip_grad_norm, and would take it twice.
    assert isinstance(optimizer, ChainedOptimizer), type(optimizer)
    found_overflow = optimizer.prepare_grads()
    assert not found_overflow, "only fp16 scales its loss"
    return optimizer.get_grad_norm()


@step_part("optimizer")
@kernel_group("optimizer")
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
    """Whether each rank's own gradients were numbers before they were added to those of other ranks, after which nobody can tell whose.

    The norm does not tell all: of parameters that tensor-parallel ranks hold alike it counts the first rank's gradient alone, so what goes
    wrong with another one's would reach that rank's weights.
    """

    def __init__(self, hooks: GradientHooks) -> None:
        self._sums: list[Tensor] = []
        hooks.register("local gradients", self._noted)

    def begin(self) -> None:
        """A step begins."""
        self._sums.clear()

    def _noted(self, start: Callable[..., Any], group: Any) -> Callable[..., Any]:
        @torch.no_grad()
        def noted(*arguments: Any, **keywords: Any) -> Any:
            # A sum is no number if a term is none. Not read here: the host does not wait for it.
            self._sums.extend(bucket.grad_data.sum() for bucket in group.buckets)
            return start(*arguments, **keywords)

        return noted

    @torch.no_grad()
    def are_finite(self) -> bool:
        """Whether all ranks' gradients of this step are. Called on every rank."""
        is_bad = self._is_bad()
        dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
        return is_bad.item() == 0

    def _is_bad(self) -> Tensor:
        """float32 [1], on the device: 0 or 1."""
        total = torch.zeros(1, device=torch.cuda.current_device())
        for each in self._sums:
            total += each
        return (~torch.isfinite(total)).float()

    def nonfinite_ranks(self) -> list[str]:
        """The ranks, with their machines, whose own gradients of this step were no numbers. Called on every rank."""
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, f"rank {dist.get_rank()} on {socket.gethostname()}" if self._is_bad().item() else None)
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
