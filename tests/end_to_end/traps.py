"""Traps: functions that a forked rank calls before it trains (runs.Sabotage), and that kill it, or do other harm, at some place."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.end_to_end.runs import Sabotage
from w1train.checkpoints import commit
from w1train.checkpoints.format import shard_files
from w1train.records import watch
from w1train.runtime import record_files as metrics_log
from w1train.training import loop, run_parts


def die() -> None:
    """Kill this process, as the kernel does when memory runs out, and a scheduler when time does."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_a_moment(share: float, victim: int = 0) -> Sabotage:
    """Kill a rank after its first step, whatever it does then: after ``share`` of the time that it took to get there.

    The time of another run would not do: one that was measured on a busy machine is longer than a whole run on a quiet one.
    """

    def sabotage(rank: int) -> None:
        start = time.monotonic()

        def die_later() -> None:
            timer = threading.Timer(share * (time.monotonic() - start), die)
            timer.daemon = True
            timer.start()

        _at_call(loop.Trainer, "record_step", 1, after=True, rank=victim, action=die_later)(rank)

    return sabotage


def _at_call(owner: Any, name: str, number: int, *, after: bool, rank: int | None = 0, action: Callable[[], None] = die) -> Sabotage:
    """SIGKILL (or what ``action`` does) before or after the ``number``-th call of a function on a rank (None = on every rank)."""

    def sabotage(this_rank: int) -> None:
        if rank is not None and this_rank != rank:
            return
        original = getattr(owner, name)
        calls = 0

        def trapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and not after:
                action()
            result = original(*args, **kwargs)
            if calls == number and after:
                action()
            return result

        setattr(owner, name, trapped)

    return sabotage


def before_record(number: int) -> Sabotage:
    """Kill rank 0 after the optimizer's step, before anything is written about that step."""
    return _at_call(loop.Trainer, "record_step", number, after=False)


def after_record(number: int) -> Sabotage:
    """Kill rank 0 at a step boundary."""
    return _at_call(loop.Trainer, "record_step", number, after=True)


def act_after_record(number: int, action: Callable[[], None]) -> Sabotage:
    """Call ``action`` on rank 0 at a step boundary."""
    return _at_call(loop.Trainer, "record_step", number, after=True, action=action)


def press_ctrl_c() -> None:
    """Send this process the signal of Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_step(number: int, rank: int | None = None, action: Callable[[], None] = press_ctrl_c) -> Sabotage:
    """Press Ctrl-C during a step, for one rank or (None) for all ranks, as a terminal does."""
    return _at_call(loop.Trainer, "compute_step", number, after=False, rank=rank, action=action)


def interrupt_start() -> Sabotage:
    """Press Ctrl-C for all ranks before the model is built."""
    return _at_call(run_parts, "build_trained_model", 1, after=False, rank=None, action=press_ctrl_c)


def interrupt_validation(number: int) -> Sabotage:
    return _at_call(loop, "validate", number, after=False, action=press_ctrl_c)


def interrupt_sampling(number: int) -> Sabotage:
    return _at_call(loop, "complete_prompts", number, after=False, action=press_ctrl_c)


def interrupt_save(number: int) -> Sabotage:
    """Press Ctrl-C while a thread makes a checkpoint of its files."""
    return _at_call(commit, "_write_manifest", number, after=False, action=press_ctrl_c)


def after_validation(number: int) -> Sabotage:
    return _at_call(loop.Trainer, "validate", number, after=True)


def after_samples(number: int) -> Sabotage:
    return _at_call(loop.Trainer, "sample", number, after=True)


def after_shards(number: int, rank: int) -> Sabotage:
    """Kill a rank when its shard is written, but neither the checkpoint's index nor its manifest."""
    return _at_call(shard_files, "_leave_note", number, after=True, rank=rank)


def before_manifest(number: int) -> Sabotage:
    return _at_call(commit, "_write_manifest", number, after=False)


def before_commit(number: int) -> Sabotage:
    """Kill rank 0 when all files of a checkpoint are written, before the rename."""
    return _at_call(commit, "_commit", number, after=False)


def after_commit(number: int) -> Sabotage:
    """Kill rank 0 when a new checkpoint is complete, before old ones are removed."""
    return _at_call(commit, "_commit", number, after=True)


def while_removing(number: int) -> Sabotage:
    """Kill rank 0 when a part of an old checkpoint is removed."""

    def sabotage(rank: int) -> None:
        original = shutil.rmtree
        calls = 0

        def trapped(path: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal calls
            calls += "removing" in str(path)
            if calls == number:
                os.unlink(next(os.scandir(path)))
                die()
            original(path, *args, **kwargs)

        if rank == 0:
            commit.shutil.rmtree = trapped

    return sabotage


def torn_line(kind: str, step: int) -> Sabotage:
    """Kill rank 0 when half a record is in its file. kind: train, validation, or sample."""

    def sabotage(rank: int) -> None:
        original: Callable = metrics_log.MetricsLog.append

        def trapped(log: metrics_log.MetricsLog, record: dict[str, Any]) -> None:
            if record["step"] == step and record.get("kind", "sample") == kind:
                line = metrics_log.encode_record(record)
                log._file.write(line[: len(line) // 2])
                log._file.flush()
                die()
            original(log, record)

        if rank == 0:
            metrics_log.MetricsLog.append = trapped  # type: ignore[method-assign]

    return sabotage


def before_summary() -> Sabotage:
    """Kill rank 0 after the last checkpoint, before the summary is written."""
    return _at_call(loop.Trainer, "summarize", 1, after=False)


def nan_gradient(step: int) -> Sabotage:
    """Make the loss of a step NaN on every rank."""

    def sabotage(rank: int) -> None:
        original = loop.run_micro_batches
        calls = 0

        def trapped(config: Any, chunks: Any, *args: Any, training: bool) -> Any:
            nonlocal calls
            calls += training
            if training and calls == step:
                next(chunks[0].parameters()).data.fill_(float("nan"))
            return original(config, chunks, *args, training=training)

        loop.run_micro_batches = trapped

    return sabotage


def infinite_parameter(step: int, rank: int) -> Sabotage:
    """Make a parameter infinite on a rank after the update of a step."""

    def sabotage(this_rank: int) -> None:
        original = loop.Trainer.train_step

        def trapped(trainer: loop.Trainer, batches: Any) -> None:
            original(trainer, batches)
            if trainer.progress.step == step:
                next(trainer.model.chunks[0].parameters()).data.view(-1)[0] = float("inf")

        if this_rank == rank:
            loop.Trainer.train_step = trapped  # type: ignore[method-assign]

    return sabotage


def wait_at_step(step: int, here: Any, go_on: Any) -> Sabotage:
    """Touch ``here`` when ``step`` is done, and wait until ``go_on`` exists."""

    def sabotage(rank: int) -> None:
        original = watch.Watch.record

        def trapped(self: watch.Watch, kind: str, values: dict[str, Any]) -> None:
            original(self, kind, values)
            if kind == "train" and self.progress.step == step:
                here.touch()
                while not go_on.exists():
                    threading.Event().wait(0.02)

        if rank == 0:
            watch.Watch.record = trapped  # type: ignore[method-assign]

    return sabotage


def fill_disk(directory: Any, num_bytes_left: int, number: int) -> Sabotage:
    """Fill a disk up to ``num_bytes_left`` with a file, right before the ``number``-th save."""

    def fill() -> None:
        (directory / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(directory).free - num_bytes_left)))

    return _at_call(loop.Trainer, "save", number, after=False, action=fill)


def at_average_commit() -> Sabotage:
    """Kill rank 0 when all files of an average are written, before the rename."""

    def sabotage(rank: int) -> None:
        original = commit._commit

        def trapped(writing: Any, final: Any) -> None:
            if final.name.startswith("average_"):
                die()
            original(writing, final)

        if rank == 0:
            commit._commit = trapped

    return sabotage


def nan_in_gradient(rank: int, steps: list[int], times: int) -> Sabotage:
    """Make an element of a rank's gradients NaN, the first ``times`` times that each of the steps is computed."""

    def sabotage(this_rank: int) -> None:
        calls: dict[int, int] = {}
        original = loop.Trainer.compute_step

        def compute_step(trainer: loop.Trainer, batches: Any) -> Any:
            step = trainer.progress.step + 1
            calls[step] = calls.get(step, 0) + 1
            # In the backward pass, as a fault of the machine would: it comes before the reduction of buckets during that pass too.
            parameter = next(trainer.model.stages[0].parameters())
            bad = step in steps and calls[step] <= times
            hook = (
                parameter.register_hook(lambda gradient: gradient.index_fill(0, gradient.new_zeros(1).long(), float("nan")))
                if bad
                else None
            )
            result = original(trainer, batches)
            if hook is not None:
                hook.remove()
            return result

        if this_rank == rank:
            loop.Trainer.compute_step = compute_step  # type: ignore[method-assign]

    return sabotage


def scaled_gradient(steps: list[int], factor: float) -> Sabotage:
    """Multiply the gradients of some steps by ``factor``, each time that they are computed."""

    def sabotage(rank: int) -> None:
        original = loop.Trainer.compute_step

        def compute_step(trainer: loop.Trainer, batches: Any) -> Any:
            bad = trainer.progress.step + 1 in steps
            parameters = [*trainer.model.stages[0].parameters()]
            hooks = [parameter.register_hook(lambda gradient: gradient * factor) for parameter in parameters] if bad else []
            result = original(trainer, batches)
            for hook in hooks:
                hook.remove()
            return result

        loop.Trainer.compute_step = compute_step  # type: ignore[method-assign]

    return sabotage


def signal_after_record(number: int, which: signal.Signals, rank: int) -> Sabotage:
    """Send a signal to a rank at a step boundary."""
    return _at_call(loop.Trainer, "record_step", number, after=True, rank=rank, action=lambda: os.kill(os.getpid(), which))


def hang_at_step(step: int, rank: int, number: signal.Signals | None = None) -> Sabotage:
    """Hang a rank before the collectives of a step; ``number``: a signal that it gets right before."""

    def sabotage(this_rank: int) -> None:
        original = loop.Trainer.compute_step

        def hang(trainer: loop.Trainer, batches: Any) -> Any:
            if trainer.progress.step + 1 == step:
                if number is not None:
                    os.kill(os.getpid(), number)
                time.sleep(3600)
            return original(trainer, batches)

        if this_rank == rank:
            loop.Trainer.compute_step = hang  # type: ignore[method-assign]

    return sabotage


def after_call_of_save(number: int, action: Callable[[], None]) -> Sabotage:
    """Call ``action`` when the ``number``-th save has returned."""
    return _at_call(loop.Trainer, "save", number, after=True, action=action)
