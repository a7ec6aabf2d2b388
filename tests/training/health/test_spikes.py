"""What is a spike, and what only looks like one."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w1train.training.health.spikes import SpikeWindow

SIGMAS = {"masked_cross_entropy": 6.0, "grad_norm": 12.0}
SIZE = 128


def values(step: int, seed: int = 0) -> dict[str, float]:
    """As the demo's: the cross-entropy falls and is near normal, the gradient norm's logarithm has a standard deviation of 0.3, and every
    hundredth of them is ten times too large (a sample at a small t)."""
    noise = random.Random(f"{seed}/{step}")
    grad_norm = math.exp(noise.gauss(-0.3, 0.3)) * (10.0 if step % 100 == 99 else 1.0)
    return {"masked_cross_entropy": 4 + 2 * math.exp(-step / 100) + noise.gauss(0, 0.1), "grad_norm": grad_norm}


def window(state: dict | None = None, **sigmas: float | None) -> SpikeWindow:
    return SpikeWindow({} if state is None else state, SIZE, SIGMAS | sigmas)


def fill(spikes: SpikeWindow, num_steps: int, stage: str = "a") -> SpikeWindow:
    for step in range(num_steps):
        spikes.add(values(step), stage)
    return spikes


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_a_spike_in_a_run_without_one(seed):
    spikes = window()
    for step in range(1500):
        assert spikes.spike(values(step, seed), "a") is None, step
        spikes.add(values(step, seed), "a")


@pytest.mark.parametrize(("name", "factor"), [("masked_cross_entropy", 1.6), ("grad_norm", 1e5)])
def test_a_spike_is_one(name, factor):
    spikes = fill(window(), 300)
    normal = values(300)
    found = spikes.spike(normal | {name: normal[name] * factor}, "a")
    assert found is not None
    assert found.startswith(f"{name} is ")
    assert spikes.spike(normal, "a") is None
    assert window(**{name: None}).spike(normal | {name: math.inf}, "a") is None


def test_off_until_half_full_and_anew_in_each_stage():
    huge = dict.fromkeys(SIGMAS, 1e30)
    assert fill(window(), SIZE // 2 - 1).spike(huge, "a") is None
    spikes = fill(window(), SIZE // 2)
    assert spikes.spike(huge, "a") is not None
    assert spikes.spike(huge, "b") is None
    spikes.add(values(0), "b")
    assert spikes.spike(huge, "b") is None
    fill(spikes, SIZE // 2, "b")
    assert spikes.spike(huge, "b") is not None
    spikes.clear()
    assert spikes.spike(huge, "b") is None


@given(st.lists(st.floats(1e-3, 1e3), min_size=SIZE // 2, max_size=SIZE), st.floats(1e-3, 1e5))
def test_the_limit_of_the_cross_entropy_is_the_definition(history, value):
    """Median + 6 x the larger of standard deviation, 1.4826 x median deviation, and 3 % of the median."""
    state: dict = {}
    spikes = SpikeWindow(state, SIZE, SIGMAS)
    for item in history:
        spikes.add({"masked_cross_entropy": item, "grad_norm": 1.0}, "a")
    middle = statistics.median(history)
    deviations = (statistics.pstdev(history), 1.4826 * statistics.median(abs(item - middle) for item in history), 0.03 * middle)
    limit = middle + 6 * max(deviations)
    if not math.isclose(value, limit, rel_tol=1e-9):
        assert (spikes.spike({"masked_cross_entropy": value, "grad_norm": 1.0}, "a") is not None) == (value > limit)


def test_the_state_survives_json_and_stays_small():
    state: dict = {}
    fill(window(state), 300)
    copy = json.loads(json.dumps(state))
    assert copy == state
    assert [len(state[name]) for name in SIGMAS] == [SIZE, SIZE]
    probes = [values(300) | {"masked_cross_entropy": 4 + 0.01 * number} for number in range(200)]
    assert [window(copy).spike(probe, "a") for probe in probes] == [window(state).spike(probe, "a") for probe in probes]
