"""Names that options take from tables: unknown names are mistakes of the configuration, and known names cost no import."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from launch.check import checked_config
from tests.tiny import tiny_config
from w1train import registered_names
from w1train.attention.backends.choice import BACKENDS, choose_backend
from w1train.config.errors import ConfigurationError
from w1train.config.rules.attention_limits import attention_case
from w1train.config.rules.rule import OWN_PROCESSES
from w1train.config.rules.sampling_rules import OWN_KERNELS, OWN_ORDERS
from w1train.config.rules.validate import validate
from w1train.config.schema import DiffusionConfig
from w1train.config.serialization import config_to_yaml
from w1train.diffusion.autoregressive import AutoregressiveProcess
from w1train.diffusion.masked import MaskedProcess
from w1train.diffusion.processes import PROCESSES, noise_process
from w1train.objectives.objective import objective_of
from w1train.plan import main as plan
from w1train.registered_names import NAME_RULES
from w1train.runtime.megatron_on_cpu import import_megatron
from w1train.sampling.kernels import KERNELS
from w1train.sampling.rules import ORDERS

import_megatron()

from w1train.training import inputs  # noqa: E402


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
    assert {name: noise_process(DiffusionConfig(objective=name)).is_causal for name in OWN_PROCESSES} == OWN_PROCESSES
    assert {name: ORDERS[name].are_log_probabilities for name in OWN_ORDERS} == OWN_ORDERS
    assert set(OWN_KERNELS) == set(KERNELS)


class SecondCausal(AutoregressiveProcess):
    """A causal process of another name."""

    name = "second causal"


def test_a_second_causal_process_is_causal_everywhere(monkeypatch):
    """Its tokens must not see the future, and it needs nothing that noise needs."""
    monkeypatch.setitem(PROCESSES, "second", lambda config: SecondCausal())
    settings = {
        "diffusion": {"objective": "second", "noisy_attention": "causal", "autoregressive_weight": 0.5, "attention_annealing": "random"},
        "sampling": {"num_tokens": 8, "num_steps": 8, "block_size": 5, "threshold": 0.5, "remasking": "random"},
        "attention": {"backend": "flex"},
        "model": {"kv_channels": 16},
    }
    config = tiny_config(**settings)
    config.diffusion.annealing_tokens = 1
    config.schedule.stages["all"].diffusion = {"attention_annealing": "random"}
    assert name_problems(config) == []
    config.diffusion.objective = "autoregressive"
    causal = [problem.key for problem in validate(config)]
    config.diffusion.objective = "second"
    assert [problem.key for problem in validate(config)] == causal
    chosen = []
    monkeypatch.setattr(inputs, "choose_backend", lambda name, case, device: chosen.append(case.kind))
    inputs.choose_backends(config, torch.device("cpu"))
    assert chosen == ["causal"]


def test_a_further_process_of_noise_keeps_the_rules(monkeypatch):
    """Each rule that an autoregressive run is free of."""
    monkeypatch.setitem(PROCESSES, "other", lambda config: MaskedProcess(config.mask_token_id))
    settings = {
        "diffusion": {"noisy_attention": "causal", "autoregressive_weight": 0.5, "attention_annealing": "random", "annealing_tokens": 9},
        "sampling": {"num_tokens": 8, "num_steps": 8, "block_size": 5, "threshold": 0.5, "remasking": "random"},
        "attention": {"backend": "flex"},
        "model": {"kv_channels": 16},
    }
    config = tiny_config(**settings)
    expected = {problem.key for problem in validate(config)}
    config.diffusion.objective = "other"
    assert {problem.key for problem in [*validate(config), *name_problems(config)]} == expected
    assert {"attention.backend", "diffusion.noisy_attention", "sampling.remasking", "sampling.block_size"} <= expected


def test_the_configuration_of_a_run_is_checked(tmp_path):
    config = tiny_config(diffusion={"objective": "bogus"}, sampling={"remasking": "randm"})
    with pytest.raises(ConfigurationError) as raised:
        registered_names.require_registered_names(config, tmp_path / "config.yaml")
    assert [problem.key for problem in raised.value.problems] == ["diffusion.objective", "sampling.remasking"]
    assert f"in the configuration {tmp_path / 'config.yaml'}" in str(raised.value)


@pytest.mark.parametrize("command", ["average", "evaluate", "sample"])
def test_commands_refuse_a_run_with_unknown_names(command, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(config_to_yaml(tiny_config(diffusion={"objective": "bogus"})))
    assert importlib.import_module(f"w1train.{command}").main([str(tmp_path)]) == 2
    assert "diffusion.objective\n   found: 'bogus'\n   valid: one of: diffusion, autoregressive" in capsys.readouterr().err


def test_launchers_report_them_with_other_mistakes():
    """Also where a field could not be read at all."""
    for wrong, key in (("diffusion.num_strata=3", "diffusion.num_strata"), ("diffusion.t_min=many", "diffusion.t_min")):
        with pytest.raises(ConfigurationError, match="valid: one of: cross_entropy") as raised:
            checked_config(["recipe=demo", "diffusion.loss=entropy", wrong], None)
        assert [problem.key for problem in raised.value.problems] == [key, "diffusion.loss"]


def test_the_planner_refuses_them(capsys):
    for how in ([], ["--search"]):
        with pytest.raises(SystemExit, match="2"):
            plan(["recipe=demo", "gpus=1", "diffusion.objective=unifrom", *how])
        assert "diffusion.objective\n   found: 'unifrom'" in capsys.readouterr().err


def test_a_name_of_an_old_run_is_a_mistake_wherever_it_is_used():
    """A configuration that no command line made, such as that of a run directory."""
    with pytest.raises(ConfigurationError, match=r"diffusion.objective\n.*'unifrom'\n.*diffusion, autoregressive"):
        noise_process(DiffusionConfig(objective="unifrom"))
    with pytest.raises(ConfigurationError, match=r"diffusion.loss\n.*'entropy'\n.*cross_entropy"):
        objective_of(DiffusionConfig(loss="entropy"), 1)
    with pytest.raises(ConfigurationError, match=r"attention.backend\n.*'flash'"):
        choose_backend("flash", attention_case(tiny_config(), is_causal=False), torch.device("cpu"))


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
