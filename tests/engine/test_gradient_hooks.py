"""Measurements around megatron-core's functions are called in one order, whoever registers first."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from tests.distributed import run_distributed
from tests.tiny import packed_batch, tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine.building import TrainedModel, build_trained_model  # noqa: E402
from w1train.engine.gradient_hooks import ORDER, GradientHooks  # noqa: E402
from w1train.engine.gradients import LocalGradients, prepare_gradients, step_with_prepared_gradients  # noqa: E402
from w1train.profiling.stopwatches import CommunicationTimer  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.runtime.ranges import step_part  # noqa: E402
from w1train.training.forward import run_micro_batches  # noqa: E402
from w1train.training.health.stragglers import StragglerClock  # noqa: E402

FUNCTIONS = ("start_grad_sync", "start_param_sync", "finish_param_sync")
MEASUREMENTS = ("stragglers", "communication", "local gradients")


class Group:
    """A bucket group of megatron-core's."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start_grad_sync(self) -> str:
        return self._called("start_grad_sync")

    def start_param_sync(self, force_sync: bool = False) -> str:
        return self._called(f"start_param_sync({force_sync})")

    def finish_param_sync(self) -> str:
        return self._called("finish_param_sync")

    def _called(self, name: str) -> str:
        self.calls.append(name)
        return name


def parts() -> tuple[SimpleNamespace, Group, Group, list[str]]:
    """(configuration, group of a chunk, its group of experts, what was called)"""
    calls: list[str] = []

    def finalize(chunks: list, num_tokens: int) -> int:
        calls.append(f"finalize {num_tokens}")
        return num_tokens

    group, experts = Group(), Group()
    group.calls = experts.calls = calls
    return SimpleNamespace(finalize_model_grads_func=finalize), group, experts, calls


def noting(name: str, calls: list[str]):
    def hook(function, owner):
        def call(*arguments, **options):
            calls.append(name)
            return function(*arguments, **options)

        return call

    return hook


@pytest.mark.parametrize("order", itertools.permutations(MEASUREMENTS))
def test_the_order_of_registration_does_not_matter(order):
    config, group, experts, calls = parts()
    hooks = GradientHooks(config, [SimpleNamespace(bucket_groups=[group], expert_parallel_bucket_groups=[experts])])
    for name in order:
        hooks.register(name, noting(name, calls))
    assert config.finalize_model_grads_func([], num_tokens=7) == 7
    assert calls == ["stragglers", "communication", "finalize 7"]
    for each in (group, experts):
        calls.clear()
        assert each.start_grad_sync() == "start_grad_sync"
        assert each.start_param_sync(force_sync=True) == "start_param_sync(True)"
        assert each.finish_param_sync() == "finish_param_sync"
        before = ["local gradients", "start_grad_sync", "communication", "start_param_sync(True)", "communication", "finish_param_sync"]
        assert calls == before


def test_the_range_of_a_profile_is_around_all_of_the_reduction():
    config, _, _, calls = parts()
    hooks = GradientHooks(config, [])
    hooks.register("communication", noting("communication", calls))
    hooks.register("stragglers", noting("stragglers", calls))

    with step_part.listening(lambda name: calls.append(name) or _Ending(calls)):
        config.finalize_model_grads_func([], num_tokens=1)
    assert calls == ["reduce", "stragglers", "communication", "finalize 1", "end"]


@dataclass
class _Parts:
    names: list[str]

    def mark(self, name: str) -> contextlib.AbstractContextManager[None]:
        self.names.append(name)
        return contextlib.nullcontext()


class _Ending:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.calls.append("end")


def test_what_nobody_measures_stays_megatrons_own():
    config, group, experts, _ = parts()
    hooks = GradientHooks(config, [SimpleNamespace(bucket_groups=[group], expert_parallel_bucket_groups=[experts])])
    assert not {*FUNCTIONS} & (vars(group).keys() | vars(experts).keys())
    hooks.register("local gradients", noting("local gradients", []))
    assert vars(group).keys() & {*FUNCTIONS} == {"start_grad_sync"}
    with pytest.raises(AssertionError, match="registered already"):
        hooks.register("local gradients", noting("again", []))


def test_the_list_knows_no_function_that_is_not_there():
    assert set(ORDER) == {"finalize_model_grads_func", *FUNCTIONS}


def steps(rank: int, world_size: int, order: tuple[str, ...], sections: dict) -> list:
    """(parts that a profile hears of, stretches of communication that were timed, whether all gradients were finite, metrics of the
    comparison of ranks, the gradients' norm), of two steps."""
    config = tiny_config(**sections)
    with distributed(config.parallel) as ranks:
        model = build_trained_model(config)
        watch = SimpleNamespace(starts=0, stops=0)
        watch.start = lambda: setattr(watch, "starts", watch.starts + 1)
        watch.stop = lambda: setattr(watch, "stops", watch.stops + 1)
        made = {name: MAKE[name](model, watch) for name in order}
        found = []
        for step in range(2):
            parts = _Parts([])
            made["stragglers"].begin(step + 1)
            made["local gradients"].begin()
            with step_part.listening(parts.mark):
                compute(model, config, ranks.data_parallel_rank, step)
                norm = prepare_gradients(model.optimizer)
                step_with_prepared_gradients(model.optimizer, norm)
            assert watch.starts == watch.stops
            found.append([parts.names, watch.starts, made["local gradients"].are_finite(), sorted(made["stragglers"].metrics), float(norm)])
        return found


MAKE = {
    "stragglers": lambda model, watch: StragglerClock(model.hooks, interval=2, warning_share=0.5),
    "communication": lambda model, watch: CommunicationTimer(model.hooks, watch),
    "local gradients": lambda model, watch: LocalGradients(model.hooks),
}


def compute(model: TrainedModel, config, rank: int, step: int) -> None:
    model.zero_gradients()
    size = config.training.micro_batch_size
    batches = [corrupt(packed_batch(range(first, first + size)), config.diffusion, seed=0) for first in (rank * 8 + step * 16,)]
    run_micro_batches(config, list(model.chunks), iter(batches), len(batches), training=True)


@pytest.mark.parametrize("sections", [{}, {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}])
def test_the_real_measurements_measure_the_same_in_any_order(sections):
    first = run_distributed(steps, 2, MEASUREMENTS, sections)
    last = run_distributed(steps, 2, MEASUREMENTS[::-1], sections)
    assert first == last
    for each in first:
        assert [step[3] for step in each] == [[], ["health/rank_spread", "health/slowest_rank"]]
        assert all(step[2] for step in each)
        for names, starts, *_ in each:
            assert names == ["optimizer", "data", "forward", "forward", "backward", "reduce", "optimizer", "optimizer"]
            assert starts >= 1
