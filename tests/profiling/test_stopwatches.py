"""What is counted as waiting for communication."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from w1train.engine.gradient_hooks import GradientHooks
from w1train.profiling.stopwatches import CommunicationTimer, CudaStopwatch, HostStopwatch


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


class Group:
    """A bucket group of megatron-core's: the end of one gathering starts the next."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def start_grad_sync(self) -> None:
        self.clock.now += 8.0

    def start_param_sync(self, force_sync: bool = False) -> None:
        self.clock.now += 1.0

    def finish_param_sync(self) -> None:
        self.clock.now += 2.0
        self.start_param_sync()


def model(clock: Clock) -> SimpleNamespace:
    def finalize(chunks: list, num_tokens: int) -> int:
        clock.now += 4.0
        return num_tokens

    chunk = SimpleNamespace(bucket_groups=[Group(clock)], expert_parallel_bucket_groups=[])
    return SimpleNamespace(chunks=[chunk], config=SimpleNamespace(finalize_model_grads_func=finalize))


def test_reduction_and_gathering_are_counted_once():
    clock = Clock()
    trained = model(clock)
    timer = CommunicationTimer(GradientHooks(trained.config, trained.chunks), HostStopwatch(clock))
    assert trained.config.finalize_model_grads_func([], num_tokens=7) == 7
    clock.now += 100.0
    trained.chunks[0].bucket_groups[0].finish_param_sync()
    assert timer.take() == 4.0 + 3.0
    assert timer.take() == 0.0
    trained.chunks[0].bucket_groups[0].start_param_sync(force_sync=True)
    assert timer.take() == 1.0
    trained.chunks[0].bucket_groups[0].start_grad_sync()
    assert timer.take() == 0.0, "it is sent beside the backward pass"


def test_events_that_have_not_happened_are_read_later(monkeypatch):
    class Event:
        clock, reached = 0.0, 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = Event.clock

        def query(self) -> bool:
            return self.at <= Event.reached

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stopwatch = CudaStopwatch()
    for begin, end in ((0.0, 2.0), (10.0, 13.0)):
        Event.clock = begin
        stopwatch.start()
        Event.clock = end
        stopwatch.stop()
    Event.reached = 5.0
    assert stopwatch.take() == 2.0
    assert stopwatch.take() == 0.0
    Event.reached = 20.0
    assert stopwatch.take() == 3.0
