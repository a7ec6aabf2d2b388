"""Rules of low-rank adapters, and what their patterns name."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_config, tiny_experts
from w1train.config.rules.adapter_rules import ADAPTER_RULES
from w1train.config.schema_adapters import AdaptersConfig, is_adapted, is_trained, linear_names

SIGMOID = tiny_experts(score="sigmoid", has_bias=True)


def _problems(**sections):
    return [problem for rule in ADAPTER_RULES for problem in rule(tiny_config(**sections))]


@pytest.mark.parametrize(
    ("sections", "key", "words"),
    [
        ({"adapters": {"rank": 2, "modules": ["q_proj"]}}, "adapters.modules", "self_attention.linear_qkv, self_attention.linear_proj"),
        ({"adapters": {"rank": 2, "modules": ["mlp.experts.*"]}, "model": tiny_experts()}, "adapters.modules", "routed experts"),
        ({"adapters": {"rank": 2, "modules": []}}, "adapters.modules", "adapters.rank=0"),
        ({"adapters": {"rank": 33}}, "adapters.rank", "at most model.hidden_size (32)"),
        ({"adapters": {"rank": 2}, "optimizer": {"name": "muon"}}, "optimizer.name", "adamw with adapters"),
        ({"adapters": {"rank": 2}, "model": SIGMOID, "balance": {"bias_rate": 0.001}}, "balance.bias_rate", "0 with adapters"),
        ({"adapters": {"rank": 2}, "diffusion": {"objective": "learned_masked"}}, "adapters.train", "noise_rates.*"),
    ],
)
def test_a_mistake_is_named_with_what_would_be_valid(sections, key, words):
    (problem,) = _problems(**sections)
    assert problem.key == key
    assert words in problem.valid
    without = {**sections, "adapters": {**sections["adapters"], "rank": 0}}
    assert not _problems(**without)


def test_modules_are_those_that_the_model_has():
    assert linear_names(tiny_config(model=tiny_experts()).model)[2:] == (
        "mlp.linear_fc1",
        "mlp.linear_fc2",
        "mlp.shared_experts.linear_fc1",
        "mlp.shared_experts.linear_fc2",
    )
    assert len(linear_names(tiny_config(model=tiny_experts(num_dense_layers=0, shared_ffn_hidden_size=0)).model)) == 2
    assert not _problems(adapters={"rank": 2, "modules": ["self_attention.*", "mlp.linear_fc2"]})


def test_a_pattern_adapts_linear_layers_alone():
    assert is_adapted("mlp.shared_experts.linear_fc1", AdaptersConfig(rank=1))
    assert not is_adapted("mlp.experts.linear_fc1", AdaptersConfig(rank=1))
    assert not is_adapted("input_layernorm", AdaptersConfig(rank=1))


def test_adapters_and_named_parameters_are_trained():
    adapters = AdaptersConfig(rank=2, train=["final_norm.*"])
    assert is_trained("decoder.layers.0.mlp.linear_fc1.lora_b", adapters)
    assert is_trained("final_norm.weight", adapters)
    assert not is_trained("decoder.layers.0.mlp.linear_fc1.weight", adapters)
    assert is_trained("decoder.layers.0.mlp.linear_fc1.weight", AdaptersConfig())


def test_the_scale_is_alpha_over_the_rank_or_over_its_root():
    assert AdaptersConfig(rank=4, alpha=8).scale == 2
    assert AdaptersConfig(rank=4, alpha=8, rank_stabilized=True).scale == 4
