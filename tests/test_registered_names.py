"""Names that options take from tables: unknown names are mistakes of the configuration, and known names cost no import."""

from __future__ import annotations

import sys

import pytest
import torch

from launch.check import checked_config
from tests.tiny import tiny_config
from w1train import registered_names
from w1train.attention.backends.choice import BACKENDS, choose_backend
from w1train.config.errors import ConfigurationError
from w1train.config.rules.attention_limits import attention_case
from w1train.config.schema import DiffusionConfig
from w1train.diffusion.processes import noise_process
from w1train.objectives.objective import objective_of
from w1train.plan import main as plan
from w1train.registered_names import NAME_RULES


def name_problems(config):
    return [problem for rule in NAME_RULES for problem in rule(config)]


def test_unknown_names_are_reported_together():
    config = tiny_config(
        diffusion={"objective": "autoregresive", "loss": "kl"},
        sampling={"remasking": "randm"},
        attention={"backend": "Flex"},
        optimizer={"name": "adamW"},
    )
    config.schedule.stages["all"].diffusion = {"loss": "cross_entropie"}
    problems = name_problems(config)
    assert {problem.key: problem.suggestion for problem in problems} == {
        "diffusion.objective": "did you mean autoregressive?",
        "diffusion.loss": None,
        "schedule.stages.all.diffusion.loss": "did you mean cross_entropy?",
        "sampling.remasking": "did you mean random?",
        "attention.backend": "did you mean flex?",
        "optimizer.name": "did you mean adamw?",
    }
    valid = ", ".join(["auto", *BACKENDS])
    assert {problem.key: problem.valid for problem in problems}["attention.backend"] == f"one of: {valid}"


def test_the_usual_names_are_in_the_tables():
    """The check accepts them without a look at the tables."""
    assert {"diffusion", "autoregressive"} <= {*registered_names._processes()}
    assert {"cross_entropy"} <= {*registered_names._losses()}
    assert {"low_confidence", "random"} <= {*registered_names._orders()}
    assert {"auto", "cudnn", "flex", "te", "sdpa", "reference"} <= {*registered_names._backends()}
    assert {"adamw"} <= {*registered_names._optimizers()}
    assert name_problems(tiny_config()) == []


def test_launchers_report_them_with_other_mistakes():
    """Also where a field could not be read at all."""
    for wrong, key in (("diffusion.num_strata=3", "diffusion.num_strata"), ("diffusion.t_min=many", "diffusion.t_min")):
        with pytest.raises(ConfigurationError, match="valid: one of: cross_entropy") as raised:
            checked_config(["recipe=demo", "diffusion.loss=entropy", wrong], None)
        assert [problem.key for problem in raised.value.problems] == [key, "diffusion.loss"]


def test_the_planner_refuses_them(capsys):
    for how in ([], ["--search"]):
        with pytest.raises(SystemExit, match="2"):
            plan(["recipe=demo", "gpus=1", "diffusion.objective=uniform", *how])
        assert "diffusion.objective\n   found: 'uniform'" in capsys.readouterr().err


def test_a_name_of_an_old_run_is_a_mistake_wherever_it_is_used():
    """A configuration that no command line made, such as that of a run directory."""
    with pytest.raises(ConfigurationError, match=r"diffusion.objective\n.*'uniform'\n.*diffusion, autoregressive"):
        noise_process(DiffusionConfig(objective="uniform"))
    with pytest.raises(ConfigurationError, match=r"diffusion.loss\n.*'entropy'\n.*cross_entropy"):
        objective_of(DiffusionConfig(loss="entropy"), 1)
    with pytest.raises(ConfigurationError, match=r"attention.backend\n.*'flash'"):
        choose_backend("flash", attention_case(tiny_config()), torch.device("cpu"))


def test_a_run_with_usual_names_waits_for_no_import(monkeypatch):
    tables = ("diffusion.processes", "objectives.objective", "sampling.rules", "attention.backends.choice", "engine.optimizers")
    for module in tables:
        monkeypatch.setitem(sys.modules, f"w1train.{module}", None)
    for settings in (
        {},
        {"attention": {"backend": "flex"}, "sampling": {"remasking": "random"}, "diffusion": {"objective": "autoregressive"}},
    ):
        assert name_problems(tiny_config(**settings)) == []
    with pytest.raises(ImportError):
        name_problems(tiny_config(diffusion={"loss": "kl"}))
