"""Configurations that learned rates of noise cannot work with."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_config
from w1train.config.errors import Problem
from w1train.config.rules.learned_rates_rules import LEARNED_RATES_RULES
from w1train.config.schema import Config, StageConfig

VALID = {"objective": "learned_masked", "loss": "per_id", "coupled_draws": True}


def _config(diffusion: dict | None = None, model: dict | None = None, training: dict | None = None) -> Config:
    return tiny_config(diffusion=VALID | (diffusion or {}), model={"learns_noise_rates": True} | (model or {}), training=training or {})


def _problems(config: Config) -> list[Problem]:
    return [problem for rule in LEARNED_RATES_RULES for problem in rule(config)]


@pytest.mark.parametrize(
    "config", [_config(), _config({"weight": "elbo"}), _config({"block_size": 4, "timestep_per": "block"}), tiny_config()]
)
def test_what_works_has_no_problem(config):
    assert _problems(config) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss", "cross_entropy"),
        ("weight", "constant"),
        ("weight_max", 2.0),
        ("weight_min", 0.5),
        ("loss_positions", "all"),
        ("normalizer", "masked_tokens"),
        ("normalizer", "samples"),
        ("cross_entropy_weight", 0.01),
        ("coupled_draws", False),
        ("shift", True),
        ("exclude_mask_logit", False),
        ("num_timesteps", 1000),
        ("noise_schedule", "cosine"),
        ("t_min", 0.0),
    ],
)
def test_each_field_that_would_make_the_gradient_wrong_is_refused_with_a_value_that_works(field, value):
    (problem,) = _problems(_config({field: value}))
    assert problem.key == f"diffusion.{field}"
    key, _, suggestion = problem.suggestion.partition("=")
    assert key == problem.key
    repaired = {"true": True, "false": False, "null": None}.get(suggestion, suggestion)
    repaired = type(value)(repaired) if isinstance(value, float | int) and repaired is not None else repaired
    assert _problems(_config({field: repaired})) == []


def test_a_pair_lies_in_one_micro_batch():
    (problem,) = _problems(_config(training={"micro_batch_size": 3}))
    assert (problem.key, problem.suggestion) == ("training.micro_batch_size", "2 or 4")


def test_the_model_needs_t_and_the_rates():
    problems = _problems(_config(model={"conditioning": "none", "learns_noise_rates": False}))
    assert [problem.key for problem in problems] == ["model.conditioning", "model.learns_noise_rates"]


def test_rates_without_a_process_that_learns_them():
    (problem,) = _problems(tiny_config(model={"learns_noise_rates": True}))
    assert (problem.key, problem.suggestion) == ("model.learns_noise_rates", "model.learns_noise_rates=false")


@pytest.mark.parametrize("objective", ["diffusion", "learned_masked"])
def test_no_stage_begins_or_ends_to_learn_rates(objective):
    config = _config() if objective == "diffusion" else tiny_config()
    config.schedule.stages["later"] = StageConfig(tokens=1000, learning_rate=1e-3, diffusion={**VALID, "objective": objective})
    assert "schedule.stages.later.diffusion.objective" in [problem.key for problem in _problems(config)]
