"""Keys that may change when a run is resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.config_trees import TREE
from w1train.config.from_tree import config_from_tree
from w1train.config.resume import allowed_on_resume, check_resume
from w1train.config.schema import Config, ScheduleConfig

MakeConfig = Callable[..., Config]
STAGES = TREE["schedule"]["stages"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "branch"),
        ("runs_dir", "elsewhere"),
        ("data.num_workers", 3),
        ("data.prefetch", 1),
        ("parallel.tensor", 2),
        ("parallel.recompute", "full"),
        ("training.micro_batch_size", 2),
        ("validation.interval", 7),
        ("sampling.prompts", ["x"]),
        ("checkpoint.keep", 9),
        ("checkpoint.best_metric", "masked_cross_entropy"),
        ("logging.wandb", "offline"),
    ],
)
def test_allowed_changes(make_config: MakeConfig, key: str, value: Any) -> None:
    assert allowed_on_resume(key)
    assert check_resume(make_config(), make_config({key: value}), 500) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.hidden_size", 64),
        ("data.sequence_length", 32),
        ("diffusion.weight", "constant"),
        ("optimizer.beta2", 0.99),
        ("training.global_batch_size", 32),
        ("training.seed", 1),
        ("training.precision", "fp32"),
        ("validation.timesteps", [0.5]),
    ],
)
def test_forbidden_changes_name_key_old_and_new(make_config: MakeConfig, key: str, value: Any) -> None:
    old, new = make_config(), make_config({key: value})
    (problem,) = check_resume(old, new, 500)
    assert problem.key == key
    assert str(value) in problem.found
    assert "May change: name, runs_dir" in problem.valid
    assert not allowed_on_resume(key)


def test_data_may_move_if_they_can_be_recognised(make_config: MakeConfig) -> None:
    old, new = make_config(), make_config({"data.train": "other", "data.tokenizer": "other.json"})
    assert check_resume(old, new, 500) == []
    problems = check_resume(old, new, 500, data_are_hashed=False)
    assert [problem.key for problem in problems] == ["data.train", "data.tokenizer"]


def test_the_blend_is_part_of_what_a_run_is(make_config: MakeConfig) -> None:
    """The files of a blend may move, but its weights may change only in future stages."""
    blend = {"a": {"prefix": "x", "weight": 1.0}, "b": {"prefix": "y"}}
    base = {"data.train": None, "data.blend": blend}
    moved = {**base, "data.blend": {"a": {"prefix": "elsewhere/x", "weight": 1.0}, "b": {"prefix": "y"}}}
    heavier = {**base, "data.blend": {"a": {"prefix": "x", "weight": 2.0}, "b": {"prefix": "y"}}}
    old = make_config(base)
    assert check_resume(old, make_config(moved), 500) == []
    assert [problem.key for problem in check_resume(old, make_config(heavier), 500)] == ["data.blend.a.weight"]
    for stage, problems in (("decay", []), ("stable", ["schedule.stages.stable"])):
        new = make_config({**base, f"schedule.stages.{stage}.blend": {"b": 1.0}})
        assert [problem.key for problem in check_resume(old, new, 500)] == problems
    assert check_resume(old, make_config({**base, "data.workers": "process", "data.cache_directory": "c"}), 500) == []


def test_all_forbidden_changes_are_reported(make_config: MakeConfig) -> None:
    changes = {"model.qk_norm": True, "training.seed": 1, "schedule.stages.warmup.tokens": 50, "logging.interval": 1}
    problems = check_resume(make_config(), make_config(changes), 500)
    assert [problem.key for problem in problems] == ["model.qk_norm", "training.seed", "schedule.stages.warmup"]


# The stages of TREE: warmup 0-100, stable 100-1100, decay 1100-1300.
@pytest.mark.parametrize(
    ("stages", "consumed", "problem_key"),
    [
        ({**STAGES, "stable": STAGES["stable"] | {"tokens": 5000}}, 500, None),
        ({**STAGES, "stable": STAGES["stable"] | {"tokens": 400}}, 500, None),
        ({**STAGES, "stable": STAGES["stable"] | {"tokens": 399}}, 500, "schedule.stages.stable"),
        ({**STAGES, "stable": STAGES["stable"] | {"tokens": 5000}}, 1101, "schedule.stages.stable"),
        ({**STAGES, "stable": STAGES["stable"] | {"learning_rate": 1.0e-4}}, 500, "schedule.stages.stable"),
        ({**STAGES, "stable": STAGES["stable"] | {"learning_rate": 1.0e-4}}, 100, None),
        ({**STAGES, "decay": STAGES["decay"] | {"tokens": 900, "style": "linear"}}, 1100, None),
        ({**STAGES, "decay": STAGES["decay"] | {"tokens": 900}}, 1200, "schedule.stages.decay"),
        ({**STAGES, "again": {"tokens": 5, "learning_rate": 1.0e-3}}, 1300, None),
        # The last batch ends a little after the end of the schedule.
        ({**STAGES, "again": {"tokens": 5, "learning_rate": 1.0e-3}}, 1310, None),
        ({"warmup": STAGES["warmup"], "stable": STAGES["stable"]}, 1100, None),
        ({"warmup": STAGES["warmup"], "stable": STAGES["stable"]}, 1101, "schedule.stages.decay"),
        ({"ramp": STAGES["warmup"], "flat": STAGES["stable"], "decay": STAGES["decay"]}, 1200, None),
        ({"stable": STAGES["stable"], "warmup": STAGES["warmup"], "decay": STAGES["decay"]}, 1, "schedule.stages.warmup"),
        ({"other": {"tokens": 1, "learning_rate": 3.0}}, 0, None),
        ({**STAGES, "stable": STAGES["stable"] | {"global_batch_size": 32}}, 500, "schedule.stages.stable"),
        ({**STAGES, "warmup": STAGES["warmup"] | {"global_batch_size": 32}}, 500, "schedule.stages.warmup"),
        ({**STAGES, "warmup": STAGES["warmup"] | {"global_batch_size": TREE["training"]["global_batch_size"]}}, 500, None),
        ({**STAGES, "decay": STAGES["decay"] | {"global_batch_size": 32}}, 500, None),
    ],
)
def test_the_past_of_the_schedule_is_fixed(make_config: MakeConfig, stages: dict[str, Any], consumed: int, problem_key: str | None) -> None:
    problems = check_resume(make_config(), make_config({"schedule.stages": stages}), consumed)
    assert [problem.key for problem in problems] == ([problem_key] if problem_key else [])


def rate(schedule: ScheduleConfig, token: int) -> float | None:
    """Return the learning rate at a token as the schema defines it; None after the end."""
    start, first = 0, 0.0
    for stage in schedule.stages.values():
        progress = (token - start) / stage.tokens
        if progress < 1:
            if stage.style == "constant":
                return stage.learning_rate
            share = {"linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2, "one_minus_sqrt": math.sqrt(progress)}[
                stage.style
            ]
            return first + (stage.learning_rate - first) * share
        start, first = start + stage.tokens, stage.learning_rate
    return None


STAGE = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 6),
        "learning_rate": st.sampled_from([0.0, 0.1, 0.2]),
        "style": st.sampled_from(["constant", "constant", "linear", "cosine", "one_minus_sqrt"]),
    }
)
STAGE_LISTS = st.lists(STAGE, min_size=1, max_size=3)


@given(STAGE_LISTS, STAGE_LISTS, st.integers(0, 3), st.integers(0, 18))
def test_what_passes_has_the_same_learning_rates_in_the_past(
    stages: list[dict[str, Any]], others: list[dict[str, Any]], shared: int, consumed: int
) -> None:
    def config(stage_list: list[dict[str, Any]]) -> Config:
        return config_from_tree(TREE | {"schedule": {"stages": {f"s{index}": stage for index, stage in enumerate(stage_list)}}}).config

    old, new = config(stages), config([*stages[:shared], *others])
    consumed = min(consumed, sum(stage["tokens"] for stage in stages))
    same = all(rate(old.schedule, token) == rate(new.schedule, token) for token in range(consumed))
    if not check_resume(old, new, consumed):
        assert same
    elif sum(stage["tokens"] for stage in stages[:shared]) >= consumed:
        raise AssertionError("only the future changed")
