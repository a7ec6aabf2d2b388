"""The slowest rank is named, among ranks of the same work."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace

import pytest
import torch.distributed

from tests.distributed import run_distributed
from tests.tiny import tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.engine.gradient_hooks import GradientHooks  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.health.garbage import GarbageCollection  # noqa: E402
from w1train.training.health.stragglers import StragglerClock  # noqa: E402


def steps_with_a_slow_rank(rank: int, world_size: int, pipeline: int, seconds: dict[int, float]) -> tuple[list[dict], list[str], int]:
    with distributed(tiny_config(parallel={"pipeline": pipeline}).parallel):
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("w1train.training.health.stragglers").addHandler(handler)
        calls: list[int] = []

        def finalize(*arguments: object, **keywords: object) -> None:
            calls.append(1)
            torch.distributed.all_reduce(torch.zeros(1))  # as the sum of gradients, it waits for all ranks

        config = SimpleNamespace(finalize_model_grads_func=finalize)
        # Each step of a rank: its beginning, the end of the rank's work, and the time at which all ranks are together. Only the first is
        # read at a step that is not measured.
        times = iter(())
        clock = StragglerClock(GradientHooks(config, []), interval=2, warning_share=0.1, clock=lambda: next(times))
        found = []
        for step in range(1, 7):
            times = iter((float(step), step + seconds.get(rank, 0.0), step + max(seconds.values())))
            clock.begin(step)
            config.finalize_model_grads_func([], None)
            found.append(clock.metrics)
        return found, messages, len(calls)


def test_the_slowest_rank_is_found_every_other_step():
    results = run_distributed(steps_with_a_slow_rank, 2, 1, {1: 0.3})
    assert [calls for _, _, calls in results] == [6, 6]
    for metrics, _, _ in results:
        assert metrics[0] == metrics[2] == {}
        for measured in (metrics[1], metrics[3]):
            assert measured["health/slowest_rank"] == 1
            assert measured["health/rank_spread"] == pytest.approx(0.3)
    assert results[0][0][1]["health/rank_spread"] == results[1][0][1]["health/rank_spread"]
    assert results[0][1] == []
    assert len(results[1][1]) == 1, "twice may be chance"
    assert "rank 1 on " in results[1][1][0]
    assert "is the slowest" in results[1][1][0]


def test_stages_are_not_compared_with_each_other():
    """Of four ranks 0 and 1 are the first stage; both are late, as first stages are."""
    results = run_distributed(steps_with_a_slow_rank, 4, 2, {0: 0.3, 1: 0.3, 3: 0.2})
    for metrics, _, _ in results:
        assert metrics[1]["health/slowest_rank"] == 3
        assert metrics[1]["health/rank_spread"] == pytest.approx(0.2)


@pytest.mark.parametrize(("interval", "collected"), [(3, [False, False, True, False, False, True]), (0, [False] * 6)])
def test_garbage_is_collected_at_its_steps_alone(monkeypatch, interval, collected):
    calls: list[int] = []
    with GarbageCollection(interval) as garbage:
        assert gc.isenabled() == (interval == 0)
        monkeypatch.setattr(gc, "collect", lambda: calls.append(1))
        found = []
        for step in range(1, 7):
            garbage.step_done(step)
            found.append(bool(calls))
            calls.clear()
        monkeypatch.undo()
    assert found == collected
    assert gc.isenabled() == (interval == 0), "the process ends"
    gc.enable()
