"""The learning rate as a function of tokens."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w1train.config.schedule import learning_rate, stage_at, total_tokens
from w1train.config.schema import ScheduleConfig, StageConfig

BATCH = 1280 * 4096
TRILLION = 10**12
STYLES = ["linear", "cosine", "one_minus_sqrt"]


def llada_8b() -> ScheduleConfig:
    """arXiv 2502.09992: 2,000 warmup steps, 4e-4 until 1.2T tokens, 1e-4 for 0.8T, linear to 1e-5 over the last 0.3T."""
    warmup = 2000 * BATCH
    return ScheduleConfig(
        stages={
            "warmup": StageConfig(tokens=warmup, learning_rate=4e-4, style="linear"),
            "stable": StageConfig(tokens=12 * TRILLION // 10 - warmup, learning_rate=4e-4),
            "lower": StageConfig(tokens=8 * TRILLION // 10, learning_rate=1e-4),
            "decay": StageConfig(tokens=3 * TRILLION // 10, learning_rate=1e-5, style="linear"),
        }
    )


def warmup_and_decay(style: str) -> ScheduleConfig:
    return ScheduleConfig(
        stages={
            "warmup": StageConfig(tokens=1000, learning_rate=3e-4, style="linear"),
            "stable": StageConfig(tokens=5000, learning_rate=3e-4),
            "decay": StageConfig(tokens=4000, learning_rate=3e-5, style=style),
        }
    )


def test_llada_8b():
    schedule = llada_8b()
    assert total_tokens(schedule) == 23 * TRILLION // 10
    expected = {
        0: 0.0,
        1000 * BATCH: 2e-4,
        2000 * BATCH: 4e-4,
        TRILLION: 4e-4,
        12 * TRILLION // 10: 4e-4,
        12 * TRILLION // 10 + 1: 1e-4,
        2 * TRILLION: 1e-4,
        215 * TRILLION // 100: 5.5e-5,
        23 * TRILLION // 10: 1e-5,
        24 * TRILLION // 10: 1e-5,
    }
    assert {tokens: learning_rate(schedule, tokens) for tokens in expected} == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("style", STYLES)
def test_boundaries_are_exact(style):
    schedule = warmup_and_decay(style)
    rates = [learning_rate(schedule, tokens) for tokens in (0, 1000, 1001, 6000, 10_000, 10_001, 10**9)]
    assert rates == [0.0, 3e-4, 3e-4, 3e-4, 3e-5, 3e-5, 3e-5]


@pytest.mark.parametrize(("style", "share_left"), [("linear", 0.75), ("cosine", 0.8535533905932737), ("one_minus_sqrt", 0.5)])
def test_shape_of_the_decay(style, share_left):
    quarter = learning_rate(warmup_and_decay(style), 6000 + 1000)
    assert quarter == pytest.approx(3e-5 + (3e-4 - 3e-5) * share_left, rel=1e-12)


@pytest.mark.parametrize("style", STYLES)
def test_decay_is_continuous_and_never_rises(style):
    schedule = warmup_and_decay(style)
    rates = [learning_rate(schedule, tokens) for tokens in range(6000, 10_001)]
    steps = [later - earlier for earlier, later in pairwise(rates)]
    assert max(steps) <= 1e-18
    largest_step = (3e-4 - 3e-5) * (1 / 4000) ** (0.5 if style == "one_minus_sqrt" else 1) * 1.6
    assert min(steps) >= -largest_step


@given(
    st.lists(
        st.builds(
            StageConfig,
            tokens=st.integers(0, 50),
            learning_rate=st.floats(0, 1e-2, allow_subnormal=False),
            style=st.sampled_from(["constant", *STYLES]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_every_stage_reaches_its_rate_and_stays_between_its_ends(stages):
    schedule = ScheduleConfig(stages={f"stage_{i}": stage for i, stage in enumerate(stages)})
    start, previous = 0, 0.0
    for i, stage in enumerate(stages):
        low, high = sorted((previous, stage.learning_rate))
        for tokens in range(start + 1, start + stage.tokens + 1):
            assert stage_at(schedule, tokens) == (f"stage_{i}", (tokens - start) / stage.tokens)
            assert low * (1 - 1e-12) <= learning_rate(schedule, tokens) <= high * (1 + 1e-12)
        start, previous = start + stage.tokens, stage.learning_rate
        if stage.tokens > 0:
            assert learning_rate(schedule, start) == stage.learning_rate
    assert total_tokens(schedule) == start
    assert stage_at(schedule, start + 1) == (f"stage_{len(stages) - 1}", 1.0)
    assert learning_rate(schedule, start + 1) == stages[-1].learning_rate


def test_a_warmup_of_no_tokens_is_left_out():
    schedule = warmup_and_decay("linear")
    schedule.stages["warmup"].tokens = 0
    assert stage_at(schedule, 0) == ("stable", 0.0)
    assert learning_rate(schedule, 0) == 3e-4


def test_stage_at_the_start():
    assert stage_at(warmup_and_decay("linear"), 0) == ("warmup", 0.0)
