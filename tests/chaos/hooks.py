"""Faults inside a rank: what the launcher changes in a forked rank before it trains. w1train knows nothing of them.

A hook leaves its mark, a file, when it strikes; one that strikes once looks for it first, so that a rank that is started again is spared.
"""

from __future__ import annotations

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

# Those through which w1train and megatron-core speak to other ranks while they train, validate and save.
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
    """One element of the gradient of one parameter on rank ``victim`` is NaN at ``step``: every time the step is computed, or once.

    Args:
        parameter: which of the rank's parameters; counted round.
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
    """Rank ``victim`` sleeps for ever before the ``number``-th collective after ``step`` began; once."""

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
    """Rank ``victim`` kills itself right before or after it has done what is due at the end of the ``number``-th phase; once."""

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
    """The wall clock of these ranks jumps by so many seconds at ``step``, and stays there, also in later starts."""

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
    """Every rank stops at ``step`` as after a SIGTERM: with a checkpoint, to be started again."""

    def sabotage(_rank: int) -> None:
        original = loop.Trainer.train_step

        def train_step(trainer: loop.Trainer, batches: Any) -> None:
            if trainer.progress.step + 1 == step:
                pulse.stop_requested = True
            original(trainer, batches)

        loop.Trainer.train_step = train_step

    return sabotage
