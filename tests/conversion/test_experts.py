"""Mixtures of experts from transformers: the same function under every layout, and each rank reads its own experts alone."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.tiny_experts import EXPERT_SIZE, LING_CONFIG, MAKERS, NUM_EXPERTS, make_ling, make_qwen3_moe
from tests.conversion.tiny_models import build, causal_logits, config_for, imported_logits, logits, on_ranks
from tests.slow import slow_except
from w1train.config.errors import UserError
from w1train.conversion.families import model_from_config
from w1train.conversion.initial_weights import InitialWeights, _open
from w1train.conversion.model_fit import model_problems
from w1train.conversion.sources import SafetensorsDirectory
from w1train.engine.building import build_trained_model
from w1train.model.initialization import global_named_biases

LAYOUTS = {
    "EP2": (2, {"expert": 2}),
    "EP2, all-gather": (2, {"expert": 2, "expert_dispatcher": "all_gather"}),
    "TP2": (1, {"tensor": 2, "sequence": True}),
    "TP2 ETP2": (1, {"tensor": 2, "sequence": True, "expert_tensor": 2}),
    "TP2 EP2 ETP2": (2, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}),
    "PP2": (1, {"pipeline": 2}),
    "PP2 VPP2 EP2": (2, {"pipeline": 2, "virtual_pipeline": 2, "expert": 2}),
}
IN_EACH_RUN = [("llada2_moe", "EP2"), ("qwen3_moe", "PP2")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the directory and the causal logits of a family; each is made once."""
    made = {}

    def of(family):
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            made[family] = directory, causal_logits(MAKERS[family](directory))
        return made[family]

    return of


@pytest.mark.parametrize("case", slow_except(IN_EACH_RUN, [(family, layout) for family in MAKERS for layout in LAYOUTS]), ids=str)
def test_causal_logits_are_those_of_transformers(saved, case):
    family, layout = case
    directory, expected = saved(family)
    data_parallel, parallel = LAYOUTS[layout]
    assert expected.std() > 0.5
    for found in on_ranks(imported_logits, config_for(directory, parallel=parallel), data_parallel=data_parallel):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


MUTANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llada2_moe": {
        "no groups": {"moe_router_num_groups": None, "moe_router_group_topk": None},
        "other groups": {"moe_router_group_topk": 1},
        "no scale": {"moe_router_topk_scaling_factor": None},
    },
    "qwen3_moe": {"not normalised": {"moe_router_pre_softmax": True}},
    "llada_moe": {"normalised": {"moe_router_pre_softmax": False}},
}


def _with_mutants(_config, configs):
    """Return for each family the logits of its router, of other routers and of a router without bias."""
    found = {}
    for family, config in configs.items():
        model = build(config)
        found[family] = {"right": logits(config, model, causal=True)}
        for name, fields in MUTANTS[family].items():
            before = {field: getattr(model.config, field) for field in fields}
            for values in (fields, before):
                for field, value in values.items():
                    setattr(model.config, field, value)
                found[family].setdefault(name, logits(config, model, causal=True))
        for name, bias in global_named_biases(model.stages[0]):
            bias.zero_()
            found[family][f"no {name}"] = logits(config, model, causal=True)
    return found


def test_one_process_and_other_routers(saved):
    """The logits are those of transformers, and another router is caught."""
    configs = {family: config_for(saved(family)[0]) for family in MAKERS}
    (found,) = on_ranks(_with_mutants, configs["llada_moe"], configs)
    assert len(found["llada2_moe"]) == 1 + 3 + 3
    for family, outputs in found.items():
        _, expected = saved(family)
        torch.testing.assert_close(outputs.pop("right"), expected, rtol=0, atol=1e-5)
        for name, other in outputs.items():
            assert (other - expected).abs().max() > 0.05, name


def _reads(config):
    """Return the elements that this rank read of each tensor, by tensor, and what the parameters of its experts take."""
    weights, sizes = InitialWeights(config), {}
    source = weights.stored.source
    read = source.read

    def counted(name, box):
        tensor = read(name, box)
        sizes[name] = sizes.get(name, 0) + tensor.numel()
        return tensor

    source.read = counted
    model = build_trained_model(config, weights.load)
    own = sum(parameter.numel() for name, parameter in model.stages[0].named_parameters() if ".experts." in name)
    return sizes, own


OWNERS = {"EP2": (2, {"expert": 2}), "TP2 EP2 ETP2": (4, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2})}


@pytest.mark.parametrize("case", slow_except([(True, "EP2")], [(merged, layout) for merged in (False, True) for layout in OWNERS]), ids=str)
def test_each_rank_reads_its_experts_alone(tmp_path, case):
    merged, layout = case
    num_owners, parallel = OWNERS[layout]
    make_ling(tmp_path, merged=merged)
    ranks = on_ranks(_reads, config_for(tmp_path, parallel=parallel), data_parallel=2)
    total = {}
    for sizes, own in ranks:
        of_experts = {name: size for name, size in sizes.items() if ".experts." in name}
        assert sum(of_experts.values()) == own == 3 * 3 * EXPERT_SIZE * 32 * NUM_EXPERTS // num_owners
        assert {int(name.split(".")[5]) // (NUM_EXPERTS // 2) for name in of_experts} in ({0}, {1})
        for name, size in of_experts.items():
            total[name] = total.get(name, 0) + size
    assert len(total) == 3 * 3 * NUM_EXPERTS
    assert set(total.values()) == {EXPERT_SIZE * 32}


def test_merged_files_hold_the_matrices_of_the_others(tmp_path):
    make_ling(tmp_path / "alone")
    make_ling(tmp_path / "merged", merged=True)
    alone, merged = SafetensorsDirectory(tmp_path / "alone"), SafetensorsDirectory(tmp_path / "merged")
    assert alone.tensors == merged.tensors
    assert alone.dtypes == merged.dtypes
    for name, shape in alone.tensors.items():
        box = tuple(slice(size // 4, size - size // 4) for size in shape)
        assert torch.equal(alone.read(name, box), merged.read(name, box)), name


def test_layers_that_predict_further_tokens_are_left_out(tmp_path, caplog):
    make_ling(tmp_path, num_predictors=1, num_nextn_predict_layers=1)
    with caplog.at_level(logging.INFO, logger="w1train"):
        _open(config_for(tmp_path), tmp_path, None)
    (message,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "left out model.layers.4." in message
    assert message.endswith("(layers that predict further tokens)")


def test_a_layer_too_many_is_refused(tmp_path):
    """A layer behind the last layer is left out only if it has what predicts further tokens."""
    make_ling(tmp_path, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"unexpected: model\.layers\.3\.attention"):
        _open(config_for(tmp_path), tmp_path, None)


@pytest.mark.parametrize("lost", ["mlp.experts.5.up_proj.weight", "mlp.gate.expert_bias", "mlp.shared_experts.down_proj.weight"])
def test_a_tensor_of_experts_that_is_missing(tmp_path, lost):
    make_ling(tmp_path)
    source = tmp_path / "model.safetensors"
    tensors = load_file(source)
    del tensors[f"model.layers.2.{lost}"]
    save_file(tensors, source)
    with pytest.raises(UserError, match=re.escape(f"missing: model.layers.2.{lost}")):
        _open(config_for(tmp_path), tmp_path, None)


def test_the_same_matrix_alone_and_with_others(tmp_path):
    make_ling(tmp_path)
    matrices = torch.ones(NUM_EXPERTS, EXPERT_SIZE, 32)
    save_file({"model.layers.2.mlp.experts.up_proj": matrices}, tmp_path / "more.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is there twice, alone and in 'model"):
        SafetensorsDirectory(tmp_path)


def test_every_field_of_other_experts_is_named(tmp_path):
    make_qwen3_moe(tmp_path)
    ling, qwen = model_from_config(LING_CONFIG, "ling"), config_for(tmp_path).model
    problems = {problem.key: problem for problem in model_problems(ling, qwen, "qwen")}
    experts = {"shared_ffn_hidden_size", "score", "scale", "num_groups", "num_active_groups", "has_bias"}
    assert problems.keys() == {"model.rotary_channels", *(f"model.experts.{name}" for name in experts)}
    assert (problems["model.experts.score"].found, problems["model.experts.score"].valid) == ("'sigmoid'", "'softmax', as in qwen")
    dense = dataclasses.replace(ling, experts=type(ling.experts)())
    assert [problem.key for problem in model_problems(ling, dense, "dense")] == ["model.experts.num_experts"]
    assert "model.experts.num_experts" in [problem.key for problem in model_problems(dense, ling, "ling")]
    assert model_problems(ling, dataclasses.replace(ling, rotary_channels=6), "itself") == []


def test_equal_functions_fit():
    """Irrelevant keys may differ: with a sigmoid the weights are always normalised, and a model without dense layers
    does not use their width. A pool of experts is a choice of the run."""
    ling = model_from_config({**LING_CONFIG, "first_k_dense_replace": 0}, "ling")
    changed = {"normalize": False, "pool_per_block": 8, "router_precision": "model"}
    other = dataclasses.replace(ling, ffn_hidden_size=7, experts=dataclasses.replace(ling.experts, **changed))
    assert model_problems(other, ling, "ling") == []
    dense_first = model_from_config(LING_CONFIG, "ling")
    assert [each.key for each in model_problems(dataclasses.replace(dense_first, ffn_hidden_size=7), dense_first, "ling")] == [
        "model.ffn_hidden_size"
    ]
