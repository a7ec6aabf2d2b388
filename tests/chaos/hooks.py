"""Faults inside a rank, which the launcher sets in a forked rank before it trains. w1train has no code for them.

A hook leaves a mark, which is a file, when it strikes. A hook that strikes once looks for its mark first, so that a rank that is started
again is not disturbed.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.chaos.file_hooks import kill_myself
from tests.end_to_end.runs import Sabotage
from w1train.runtime.pulse import pulse
from w1train.training import loop

# The collectives through which w1train and megatron-core communicate while they train, validate and save.
_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "reduce_scatter_tensor",
    "broadcast",
    "broadcast_object_list",
    "batch_isend_irecv",
)


def nan_in_gradient(mark: Path, *, victim: int, step: int, parameter: int, once: bool) -> Sabotage:
    """Put a NaN into one element of a parameter's gradient on rank ``victim`` at ``step``, once or every time that the step is computed.

    Args:
        parameter: the index of the parameter on the rank, modulo their number.
    """

    def sabotage(rank: int) -> None:
        if rank != victim:
            return
        original = loop.Trainer.__init__

        def build(trainer: loop.Trainer, *args: Any) -> None:
            original(trainer, *args)

            def poison(gradient: torch.Tensor) -> torch.Tensor | None:
                if trainer.progress.step + 1 != step or (once and mark.exists()):
                    return None
                mark.touch()
                poisoned = gradient.clone()
                poisoned.view(-1)[0] = float("nan")
                return poisoned

            trained = [weight for chunk in trainer.model.chunks for weight in chunk.parameters() if weight.requires_grad]
            trained[parameter % len(trained)].register_hook(poison)

        loop.Trainer.__init__ = build  # type: ignore[method-assign]

    return sabotage


def hang_before_collective(mark: Path, *, victim: int, step: int, number: int) -> Sabotage:
    """Make rank ``victim`` sleep for ever, once, before the ``number``-th collective after the beginning of ``step``."""

    def sabotage(rank: int) -> None:
        if rank != victim or mark.exists():
            return
        original, has_begun, calls = loop.Trainer.train_step, False, 0

        def train_step(trainer: loop.Trainer, batches: Any) -> None:
            nonlocal has_begun
            has_begun = has_begun or trainer.progress.step + 1 >= step
            original(trainer, batches)

        def hanging(collective: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += has_begun
                if calls == number:
                    mark.touch()
                    time.sleep(3600.0)
                return collective(*args, **kwargs)

            return wrapped

        loop.Trainer.train_step = train_step
        for name in _COLLECTIVES:
            setattr(dist, name, hanging(getattr(dist, name)))

    return sabotage


def kill_at_phase_end(mark: Path, *, victim: int, number: int, after: bool) -> Sabotage:
    """Make rank ``victim`` kill itself once, right before or after the work at the end of the ``number``-th phase."""

    def sabotage(rank: int) -> None:
        if rank != victim or mark.exists():
            return
        original, calls = loop.Trainer.end_phase, 0

        def end_phase(trainer: loop.Trainer) -> None:
            nonlocal calls
            calls += 1
            if calls == number and not after:
                kill_myself(mark, "before the phase's end")
            original(trainer)
            if calls == number and after:
                kill_myself(mark, "after the phase's end")

        loop.Trainer.end_phase = end_phase

    return sabotage


def shift_clock(mark: Path, *, victims: Sequence[int], step: int, seconds: float) -> Sabotage:
    """Shift the wall clock of ranks by a number of seconds at ``step``. It stays shifted, also in later starts."""

    def sabotage(rank: int) -> None:
        if rank not in victims:
            return
        now, now_ns, original = time.time, time.time_ns, loop.Trainer.train_step
        time.time = lambda: now() + seconds * mark.exists()
        time.time_ns = lambda: now_ns() + int(seconds * 1e9) * mark.exists()

        def train_step(trainer: loop.Trainer, batches: Any) -> None:
            if trainer.progress.step + 1 == step:
                mark.touch()
            original(trainer, batches)

        loop.Trainer.train_step = train_step

    return sabotage


def stop_at(step: int) -> Sabotage:
    """Stop every rank at ``step`` as after a SIGTERM: with a checkpoint, and to be started again."""

    def sabotage(_rank: int) -> None:
        original = loop.Trainer.train_step

        def train_step(trainer: loop.Trainer, batches: Any) -> None:
            if trainer.progress.step + 1 == step:
                pulse.stop_signal = signal.SIGTERM
            original(trainer, batches)

        loop.Trainer.train_step = train_step

    return sabotage
