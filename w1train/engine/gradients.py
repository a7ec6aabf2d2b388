"""Gradients between the backward pass and the optimizer's update: their norm, and which ranks' gradients were NaN or infinite."""

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
    """Do the first part of the optimizer's step: bring gradients into the form that it needs, and return their norm over all ranks, which
    is the same on every rank. No parameter is updated."""
    # Other optimizers of megatron-core compute the norm inside clip_grad_norm, and would compute it twice.
    assert isinstance(optimizer, ChainedOptimizer), type(optimizer)
    found_overflow = optimizer.prepare_grads()
    assert not found_overflow, "only fp16 scales its loss"
    return optimizer.get_grad_norm()


@step_part("optimizer")
@kernel_group("optimizer")
def step_with_prepared_gradients(optimizer: MegatronOptimizer, grad_norm: Any) -> None:
    """Do the rest of the optimizer's step (clipping, update), with the norm that :func:`prepare_gradients` returned.

    This calls megatron-core's own ``step``, whose first two calls return at once what has been computed. The result therefore is that of
    ``step`` bit for bit.
    """
    optimizer.prepare_grads = lambda: False
    optimizer.get_grad_norm = lambda: grad_norm
    try:
        optimizer.step()
    finally:
        del optimizer.prepare_grads, optimizer.get_grad_norm


class LocalGradients:
    """A check of each rank's own gradients for NaN and infinite values, before the gradients of all ranks are added and the rank that had
    such a value can no longer be found.

    The gradient norm does not show all of these values. If tensor-parallel ranks have copies of a parameter, the norm counts only the first
    rank's gradient. A NaN in another rank's gradient would reach that rank's weights.
    """

    def __init__(self, hooks: GradientHooks) -> None:
        self._sums: list[Tensor] = []
        hooks.register("local gradients", self._noted)

    def begin(self) -> None:
        """Forget the last step's gradients."""
        self._sums.clear()

    def _noted(self, start: Callable[..., Any], group: Any) -> Callable[..., Any]:
        @torch.no_grad()
        def noted(*arguments: Any, **keywords: Any) -> Any:
            # A sum is NaN or infinite if one of its terms is NaN or infinite. It is read later, so that the host does not wait for the GPU
            # here.
            self._sums.extend(bucket.grad_data.sum() for bucket in group.buckets)
            return start(*arguments, **keywords)

        return noted

    @torch.no_grad()
    def are_finite(self) -> bool:
        """Return whether all ranks' gradients of this step are finite. Every rank calls this."""
        is_bad = self._is_bad()
        dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
        return is_bad.item() == 0

    def _is_bad(self) -> Tensor:
        """Return 1 if a gradient of this rank is NaN or infinite, else 0: float32 [1], on the device."""
        total = torch.zeros(1, device=torch.cuda.current_device())
        for each in self._sums:
            total += each
        return (~torch.isfinite(total)).float()

    def nonfinite_ranks(self) -> list[str]:
        """Name the ranks, with their machines, whose own gradients of this step had NaN or infinite values. Every rank calls this."""
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, f"rank {dist.get_rank()} on {socket.gethostname()}" if self._is_bad().item() else None)
        return [name for name in found if name is not None]


@torch.no_grad()
def nonfinite_parameters(chunks: Sequence[DistributedDataParallel]) -> list[str]:
    """Name this rank's parameters whose gradients have NaN or infinite values, as far as this rank holds the gradients."""
    return [
        name
        for chunk in chunks
        for name, parameter in global_named_parameters(chunk.module)
        if (gradient := getattr(parameter, "main_grad", None)) is not None and not torch.isfinite(gradient).all()
    ]
