"""Settings of the balance of experts that a model cannot follow."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_config
from w1train.config.rules.balance_rules import BALANCE_RULES

EXPERTS = {"num_experts": 8, "num_active": 2}


def _problems(experts, balance):
    config = tiny_config(balance=balance)
    for name, value in experts.items():
        setattr(config.model.experts, name, value)
    return [problem for rule in BALANCE_RULES for problem in rule(config)]


@pytest.mark.parametrize(
    ("experts", "balance"),
    [
        ({}, {}),
        ({}, {"bias_rate": 0.0}),
        (EXPERTS, {"auxiliary": 0.01, "router_z": 0.001}),
        ({**EXPERTS, "score": "sigmoid", "has_bias": True}, {"bias_rate": 0.1, "zero_mean": True, "router_z": 3.5e-6}),
    ],
)
def test_what_works_has_no_problem(experts, balance):
    assert _problems(experts, balance) == []


@pytest.mark.parametrize(
    ("experts", "key", "value"),
    [
        ({}, "auxiliary", 0.01),
        ({}, "router_z", 0.001),
        ({}, "bias_rate", 0.1),
        (EXPERTS, "bias_rate", 0.1),
        (EXPERTS, "zero_mean", True),
        ({"has_bias": True}, "zero_mean", True),
    ],
)
def test_a_setting_without_its_part_of_the_model_is_refused_with_a_value_that_works(experts, key, value):
    (problem,) = _problems(experts, {key: value})
    assert problem.key == f"balance.{key}"
    suggested_key, _, suggestion = problem.suggestion.partition("=")
    assert suggested_key == problem.key
    assert _problems(experts, {key: {"false": False}.get(suggestion) if suggestion == "false" else float(suggestion)}) == []
