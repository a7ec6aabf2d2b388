"""w1train plan: its options, exit status and JSON."""

import json

import pytest

from w1train import plan
from w1train.planning import meta_build
from w1train.planning.arguments import parse

SMALL = ["recipe=demo", "schedule=masked", "gpus=2"]

KEYS = {
    "": {
        "format_version", "name", "num_parameters", "num_active_parameters", "num_trained_parameters", "layout", "build", "work",
        "flops_per_token", "memory", "stages", "speed", "device", "assumptions", "schedule", "suggested_recompute", "suggested_expert",
    },
    "build": {"num_ranks", "num_built", "num_parameters", "seconds"},
    "memory": {"device_bytes", "needed_bytes", "fits"},
    "suggested_recompute": {"recompute", "recompute_num_layers", "needed_bytes", "step_seconds"},
    "speed": {"step_seconds", "bubble_fraction", "tokens_per_step", "tokens_per_second", "tflops_per_device", "mfu", "days"},
    "flops_per_token": {
        "attention_projections", "attention_core", "mlp", "router", "experts", "shared_experts", "adapters", "adaln", "timestep_mlp",
        "output_head", "total",
    },
    "work": {"num_tokens", "num_streams", "num_positions", "num_documents", "visible_pairs", "visible_share", "num_logits", "num_segments"},
}  # fmt: skip
STAGE_KEYS = {
    "pipeline_rank", "chunks", "num_parameters", "parameter_bytes", "gradient_bytes", "optimizer_bytes", "reference_bytes",
    "expert_parameter_bytes", "expert_gradient_bytes", "expert_optimizer_bytes", "in_flight", "activation_bytes",
    "activation_bytes_by_recompute", "micro_batch_activation_bytes", "working_bytes", "total_bytes", "traffic", "seconds",
}  # fmt: skip


def test_json_has_a_stable_schema(capsys):
    assert plan.main([*SMALL, "model.num_layers=4", "parallel.pipeline=2", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert set(output) == KEYS.pop("")
    for section, keys in KEYS.items():
        assert set(output[section]) == keys, section
    assert len(output["stages"]) == 2
    for stage in output["stages"]:
        assert set(stage) == STAGE_KEYS
        assert set(stage["activation_bytes_by_recompute"]) == {"none", "selective", "full"}
    assert output["build"]["num_parameters"] == output["num_parameters"]


def test_tables_say_what_matters(capsys):
    assert plan.main([*SMALL, "data.sequence_length=256", "--device", "h800", "--documents=64"]) == 0
    text = capsys.readouterr().out
    for words in (
        "2 x H800",
        "4 documents a sample: 16,384 visible pairs, 25.0% of all",
        "reduce-scatter",
        "MFU",
        "fits: the fullest device",
        "cheapest recomputation that fits: parallel.recompute=none",
    ):
        assert words in " ".join(text.split()), words
    assert "built 1 of 2 ranks on meta tensors" in " ".join(text.split())


def test_a_layout_that_does_not_fit_is_said(capsys):
    assert plan.main([*SMALL, "--assume", "reserved_gib=200"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.slow
def test_search_prints_layouts_and_how_to_ask_for_the_first(capsys):
    assert plan.main(["recipe=demo", "--gpus", "4", "--search"]) == 0
    text = capsys.readouterr().out
    assert "layouts tried" in text
    assert "parallel.tensor=" in text
    assert plan.main(["recipe=demo", "--gpus", "4", "--search", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["num_valid"] >= output["num_fitting"] >= len(output["layouts"]) > 0
    best = output["layouts"][0]
    assert plan.main(["recipe=demo", "gpus=4", "--json", *best["overrides"]]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["layout"] == best["layout"]
    assert again["speed"] == best["speed"]


def test_a_layout_that_breaks_rules_lists_them_all_and_builds_nothing(capsys, monkeypatch):
    monkeypatch.setattr(meta_build, "build_ranks", lambda *_: pytest.fail("built"))
    assert plan.main(["recipe=w1_4b", "gpus=512", "training.micro_batch_size=2"]) == 2
    assert "multiple of training.micro_batch_size x data-parallel ranks (2 x 512 = 1024)" in capsys.readouterr().err
    assert plan.main(["recipe=w1_4b", "gpus=3", "parallel.tensor=2"]) == 2
    assert "in a world of 3" in capsys.readouterr().err


def test_mistakes_of_flags_and_keys_are_told_together(capsys):
    assert plan.main(["recipe=demo", "model.hiden_size=1", "gpus=many", "--device", "h10", "--assume", "matmul_eficiency=0.5"]) == 2
    error = capsys.readouterr().err
    for words in ("4 problems", "found: many", "did you mean h100?", "did you mean matmul_efficiency?", "hidden_size"):
        assert words in error, words


@pytest.mark.parametrize(
    "words", [["--documents", "0"], ["--assume", "matmul_efficiency=1.5"], ["--assume", "reserved_gib=-1"], ["gpus=0"]]
)
def test_numbers_out_of_range(words, capsys):
    assert plan.main(["recipe=demo", "gpus=2", *words]) == 2
    assert words[-1].split("=")[-1] in capsys.readouterr().err


def test_gpus_may_stand_anywhere_and_are_no_recipe_key():
    for words in (["gpus=8", "recipe=demo"], ["recipe=demo", "--gpus", "8"], ["--gpus=8", "recipe=demo", "name=x"]):
        assert parse(words).num_gpus == 8


def test_help_explains_the_words_of_the_plan(capsys):
    with pytest.raises(SystemExit) as stop:
        plan.main(["--help"])
    assert stop.value.code == 0
    assert "--documents TOKENS" in capsys.readouterr().out
