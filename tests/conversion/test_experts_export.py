"""Exports of mixtures of experts: what comes in goes out bit for bit from every layout, and published models have their published sizes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversion.test_export import CAUSAL, assert_identical, export, loaded_logits, read_all
from tests.conversion.tiny_experts import LING_CONFIG, MAKERS, make_ling
from tests.conversion.tiny_models import TOKENS, causal_logits, config_for, import_and_save, logits, on_ranks, save_run, transformers
from tests.distributed import run_distributed
from tests.parallel.layouts import open_gates
from tests.slow import slow_except
from tests.tiny import tiny_config
from w1train import convert
from w1train.config.compose import load_config
from w1train.config.errors import UserError
from w1train.conversion.export import _require_computed
from w1train.conversion.families import FAMILIES, W1, family_problems, model_from_config, read_config, stock_family
from w1train.conversion.model_fit import model_problems
from w1train.conversion.tensors import EXPERT_BIAS, hugging_face_parameters, shapes
from w1train.engine.building import build_trained_model
from w1train.model.initialization import global_named_biases, global_named_parameters

LAYOUTS = {
    "one rank": (1, {}),
    "PP2": (1, {"pipeline": 2}),
    "EP2 PP2": (2, {"expert": 2, "pipeline": 2}),
    "TP2 EP2": (1, {"tensor": 2, "sequence": True, "expert": 2}),
    "TP2 EP2 ETP2": (2, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}),
}
IN_EACH_RUN = [("llada2_moe", "TP2 EP2"), ("qwen3_moe", "PP2")]


@pytest.mark.parametrize("case", slow_except(IN_EACH_RUN, [(family, layout) for family in MAKERS for layout in LAYOUTS]), ids=str)
def test_what_comes_in_goes_out(case, tmp_path, capfd):
    """The files of every layout are those that came in, also those of bfloat16 with biases in float32."""
    family, layout = case
    original, run, output = (tmp_path / name for name in ("original", "run", "output"))
    bfloat16 = family == "llada2_moe"
    model = MAKERS[family](original, **({"dtype": torch.bfloat16} if bfloat16 else {}))
    data_parallel, parallel = LAYOUTS[layout]
    precision = {"training": {"precision": "bf16"}} if bfloat16 else {}
    on_ranks(import_and_save, config_for(original, parallel=parallel, **precision), run, data_parallel=data_parallel)
    # LLaDA-MoE computes a function of qwen3_moe, so "stock" stands for that class.
    export(run, output, "--format", family if family == "llada_moe" else "stock")
    assert_identical(read_all(output), read_all(original))
    described = read_config(output)
    assert described["architectures"] == [FAMILIES[family].architecture]
    assert described["model_type"] == (FAMILIES[family].model_type or family)
    assert model_from_config(described, "output") == model_from_config(read_config(original), "original")
    assert described["torch_dtype"] == ("bfloat16" if bfloat16 else "float32")
    num_biases = 3 * 16 if bfloat16 else 0
    assert f"{sum(tensor.numel() for tensor in read_all(original).values()) - num_biases:,} parameters" in capfd.readouterr().out
    if family == "qwen3_moe":
        assert torch.equal(loaded_logits("AutoModelForCausalLM", output, tmp_path), causal_logits(model))


def _shapes_of_built(config):
    (stage,) = build_trained_model(config).stages
    found = {}
    for name, tensor in [*global_named_parameters(stage), *global_named_biases(stage)]:
        if ".experts." not in name:
            found[name] = tuple(tensor.shape)
            continue
        for expert, matrix in enumerate(tensor):
            found[name.replace(".experts.", f".experts.{expert}.")] = tuple(matrix.flatten(0, -2).shape)
    return found


def _own_config(**changes: Any):
    """Return a run of W1's shape with experts of Ling's router."""
    config = tiny_config(model={"num_layers": 3, "qk_norm": True, "rotary_channels": 6})
    ling = model_from_config(LING_CONFIG, "ling").experts
    config.model.experts = dataclasses.replace(ling, **changes)
    return config


OTHER_EXPERTS = {
    "ling": {},
    "softmax": {"score": "softmax", "has_bias": False, "shared_ffn_hidden_size": 0, "num_dense_layers": 0},
    "softmax, not normalised": {"score": "softmax", "normalize": False, "has_bias": False, "num_groups": 1, "num_active_groups": 1},
    "one expert for each token": {"num_active": 1, "num_active_groups": 1, "router_precision": "model"},
}


@pytest.mark.parametrize("name", slow_except(["ling"], OTHER_EXPERTS))
def test_listed_shapes_are_those_of_the_built_model(name):
    config = _own_config(**OTHER_EXPERTS[name])
    assert on_ranks(_shapes_of_built, config) == [shapes(config.model)]


def _trained(config, run):
    model = build_trained_model(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in [*global_named_parameters(model.stages[0]), *global_named_biases(model.stages[0])]:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * (0.6 if "router.weight" in name else 0.2))
    open_gates(model)
    save_run(config, model, run)
    return logits(config, model, causal=False, timesteps=0.3)


@pytest.mark.parametrize("name", slow_except(["ling"], OTHER_EXPERTS))
def test_own_code_equals_the_trained_model(name, tmp_path):
    """adaLN with experts is no family, so that the exported code computes it."""
    run, output = tmp_path / "run", tmp_path / "output"
    config = _own_config(**OTHER_EXPERTS[name])
    (expected,) = on_ranks(_trained, config, run)
    export(run, output)
    whole, rounded = _own_code(output, tmp_path)
    assert expected[expected.isfinite()].std() > 0.5
    torch.testing.assert_close(whole, expected, rtol=0, atol=2e-5)
    written = read_all(output)
    assert len(rounded) == len([tensor for tensor in written if "mlp.gate." in tensor]) > 0
    for tensor, found in rounded.items():
        kept = written[tensor] if tensor.endswith(EXPERT_BIAS) else written[tensor].bfloat16()
        assert torch.equal(found, kept)
        assert found.dtype == kept.dtype
    assert model_from_config(read_config(output), "output").experts == config.model.experts


def _own_code(output: Path, cache: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits of the exported code, and the routers of a model that is loaded in bfloat16."""

    def inside(_rank, _size):
        transformers.dynamic_module_utils.HF_MODULES_CACHE = str(cache)
        model = transformers.AutoModel.from_pretrained(output, trust_remote_code=True).eval()
        with torch.no_grad():
            whole = model(TOKENS, timesteps=torch.full((2,), 0.3)).logits
        rounded = transformers.AutoModel.from_pretrained(output, trust_remote_code=True, dtype=torch.bfloat16)
        return whole, {name: tensor.detach().clone() for name, tensor in rounded.named_parameters() if "mlp.gate." in name}

    return run_distributed(inside, 1, process_group=False)[0]


@pytest.mark.slow
def test_own_code_is_the_same_model_causally(tmp_path):
    original, run, output = (tmp_path / name for name in ("original", "run", "output"))
    model = make_ling(original)
    on_ranks(import_and_save, config_for(original), run)
    export(run, output)
    found = loaded_logits("AutoModel", output, tmp_path, attention_mask=CAUSAL)
    torch.testing.assert_close(found, causal_logits(model), rtol=0, atol=1e-5)


def test_models_that_no_class_computes():
    ling = model_from_config(LING_CONFIG, "ling")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"num_active": 6}, "topk_group is 2; supported: half of num_experts_per_tok (6)"),
        ({"shared_ffn_hidden_size": 24}, "model.experts.shared_ffn_hidden_size is 24, and 16 in llada2_moe"),
        ({"pool_per_block": 8}, "model.experts.pool_per_block is 8, and 0 in llada2_moe"),
        ({"score": "softmax", "has_bias": False}, "score_function is 'softmax'; supported: sigmoid"),
    ]
    for fields, problem in changes:
        (found,) = family_problems(dataclasses.replace(ling, experts=dataclasses.replace(ling.experts, **fields)), "llada2_moe")
        assert problem in found
    assert stock_family(ling) == "llada2_moe"
    assert 'model.experts.score is "sigmoid", and "softmax" in qwen3_moe' in family_problems(ling, "qwen3_moe")
    assert family_problems(ling, "llama")[-1] == "model.experts.num_experts is 16, and llama has no experts"
    dense = dataclasses.replace(ling, experts=type(ling.experts)(), rotary_channels=None)
    assert family_problems(dense, "qwen3_moe") == ["model.experts.num_experts is 0, and qwen3_moe has experts"]
    assert family_problems(dataclasses.replace(dense, rotary_channels=6), "qwen3") == ["model.rotary_channels is 6, and null in qwen3"]


_QWEN3_30B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rope_theta": 1e6,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
}
_LING_MINI = {
    **{key: LING_CONFIG[key] for key in ("score_function", "norm_topk_prob", "routed_scaling_factor", "router_dtype")},
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rope_theta": 600000,
    "partial_rotary_factor": 0.5,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 512,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 4,
    "moe_router_enable_expert_bias": True,
}
_LING_FLASH = {
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "moe_intermediate_size": 1024,
}
_LLADA_MOE = {
    "vocab_size": 157184,
    "hidden_size": 2048,
    "dense_intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "expert_intermediate_size": 1024,
    "moe_layer_freq": [1] * 16,
}
PUBLISHED: dict[str, tuple[tuple[str, str], dict[str, Any], str, int]] = {
    "llada2_mini": (("bailing_moe", "BailingMoeV2ForCausalLM"), _LING_MINI, "llada2_moe", 16_255_638_528),
    "llada2_flash": (("llada2_moe_veomni", "LLaDA2MoeModelLM"), {**_LING_MINI, **_LING_FLASH}, "llada2_moe", 102_889_697_280),
    "llada_moe_7b": (("llada", "LLaDAMoEModelLM"), _LLADA_MOE, "llada_moe", 7_356_880_896),
    "rnd1_30b": (("rnd1", "RND1LM"), _QWEN3_30B, "qwen3_moe", 30_532_122_624),
    "sdar_30b": (("sdar_moe", "SDARMoeForCausalLM"), _QWEN3_30B, "qwen3_moe", 30_532_122_624),
}


@pytest.mark.parametrize("recipe", slow_except(["llada2_mini"], PUBLISHED))
def test_recipes_are_the_published_models(recipe):
    """A recipe can start from the published weights, and its export has tensors of the published sizes under the published names."""
    (model_type, architecture), keys, family, num_parameters = PUBLISHED[recipe]
    published = {"model_type": model_type, "architectures": [architecture], **keys}
    model = load_config([f"recipe={recipe}"]).model
    assert model_problems(model, model_from_config(published, "published"), "published") == []
    assert family_problems(model, family) == []
    parts = [
        (part.tensor, part.num_rows * math.prod(parameter.shape[1:]))
        for parameter in hugging_face_parameters(model, FAMILIES[family].names)
        for part in parameter.parts
    ]
    assert sum(size for name, size in parts if not name.endswith(EXPERT_BIAS)) == num_parameters
    names, last = {name for name, _ in parts}, model.num_layers - 1
    assert f"model.layers.{last}.mlp.experts.{model.experts.num_experts - 1}.down_proj.weight" in names
    assert (f"model.layers.{last}.attention.query_key_value.weight" in names) == (family == "llada2_moe")
    assert (f"model.layers.{last}.mlp.gate.expert_bias" in names) == (family == "llada2_moe")


def test_the_command_writes_the_experts_of_a_recipe(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LING_CONFIG))
    output = tmp_path / "recipes/model/mine.yaml"
    assert convert.main(["from-hf", str(tmp_path), "--output", str(output)]) == 0
    assert "experts:\n  num_experts: 16\n  num_active: 4\n" in output.read_text()
    config = load_config(["recipe=demo", "model=mine", "data.sequence_length=32", "sampling.interval=0"], [str(tmp_path / "recipes")])
    assert config.model == model_from_config(LING_CONFIG, "ling")


def test_a_pool_of_experts_is_not_exported():
    with pytest.raises(UserError, match="pool_per_block is 8, and the exported code computes only models with 0"):
        _require_computed(_own_config(pool_per_block=8), W1)
    _require_computed(_own_config(), W1)
