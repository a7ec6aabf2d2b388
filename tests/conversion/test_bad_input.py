"""Weights that cannot be imported are refused before anything is built, and the error names the file or the key to change."""

import json
import shutil

import pytest
import torch

from tests.conversion.tiny_models import VOCAB_SIZE, config_for, make
from tests.tiny import tiny_config
from w1train.config.errors import ConfigurationError, UserError
from w1train.conversion.families import model_from_config, read_config
from w1train.conversion.initial_weights import _open, find_checkpoint

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    make("llama", directory)
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    """Return a copy of a model directory that a test may damage."""
    return shutil.copytree(saved, tmp_path / "llama")


def change_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def complaint(directory, config=None):
    """Return the text of the error."""
    config = config or config_for(directory)
    with pytest.raises(UserError) as error:
        _open(config, directory, find_checkpoint(directory))
    return str(error.value)


def test_a_whole_directory_opens(directory):
    assert _open(config_for(directory), directory, find_checkpoint(directory)).model.vocab_size == VOCAB_SIZE


def test_a_missing_shard(directory):
    lost = sorted(directory.glob("*.safetensors"))[1]
    lost.unlink()
    text = complaint(directory)
    assert f"lacks {lost.name}, of the" in text
    assert "model.safetensors.index.json" in text


def test_a_shard_that_is_a_link_to_itself(directory):
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    shard.symlink_to(shard.name)
    assert f"lacks {shard.name}, of the" in complaint(directory)


@pytest.mark.parametrize("keep", [-3, 20, 4, 0])
def test_a_truncated_shard(directory, keep):
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    assert f"{shard} is damaged or incomplete" in complaint(directory)


def test_an_index_that_names_what_is_not_there(directory):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    assert "names tensors that are in no file: model.layers.9.mlp.up_proj.weight" in complaint(directory)
    path.write_text("{")
    assert f"{path} is no index of safetensors files" in complaint(directory)


def _rewrite(directory, change):
    """Write the changed weights to one file."""
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= safetensors.load_file(path)
        path.unlink()
    (directory / "model.safetensors.index.json").unlink()
    change(tensors)
    safetensors.save_file(tensors, directory / "model.safetensors")


def test_one_file_without_an_index_will_do(directory):
    _rewrite(directory, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert _open(config_for(directory), directory, None).source.tensors["model.norm.weight"] == (32,)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"), "missing: model.layers.2.mlp.up_proj.weight"),
        (lambda tensors: tensors.pop("lm_head.weight"), "missing: lm_head.weight"),
        (lambda tensors: tensors.update(score=torch.ones(2, 32)), "unexpected: score"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(33)}), "model.norm.weight is [33], not [32]"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.ones(VOCAB_SIZE + 1, 32)}), "lm_head.weight is [97, 32], not [96, 32]"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "model.norm.weight is of type I8"),
    ],
)
def test_tensors_that_do_not_fit(directory, change, text):
    config = config_for(directory)
    _rewrite(directory, change)
    assert text in complaint(directory, config)


def test_the_same_tensor_twice(directory):
    _rewrite(directory, lambda tensors: None)
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    shutil.copyfile(directory / "a.safetensors", directory / "b.safetensors")
    assert "which another file of" in complaint(directory)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
            ["'mixtral' (MixtralForCausalLM)", "llama (LlamaForCausalLM), qwen2"],
        ),
        ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, ["'gemma'"]),
        ({"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}, ["'qwen2_moe'"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["(LlamaForSequenceClassification), which cannot be imported"]),
        ({"model_type": None, "architectures": None}, ["no architecture given"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["rope_parameters.rope_type is 'yarn'; supported: default, llama3"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling.rope_type is 'linear'"]),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}},
            ["low_freq_factor is missing", "original_max_position_embeddings is missing"],
        ),
        (
            {"hidden_act": "gelu", "mlp_bias": True, "attention_bias": True},
            ["hidden_act is 'gelu'", "mlp_bias is True", "attention_bias is True"],
        ),
        ({"use_sliding_window": True}, ["use_sliding_window is True"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types is"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor is 0.5"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config is"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_models_that_are_none_of_ours(directory, values, texts):
    change_config(directory, **values)
    with pytest.raises(UserError) as error:
        model_from_config(read_config(directory), str(directory))
    for text in texts:
        assert text in str(error.value)


def test_configurations_that_cannot_be_read(directory):
    (directory / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="has no JSON object"):
        read_config(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(UserError, match="is no configuration of a model"):
        read_config(directory)
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read_config(directory)
    with pytest.raises(UserError, match="has neither config"):
        find_checkpoint(directory)
    with pytest.raises(UserError, match="is no directory"):
        find_checkpoint(directory / "nowhere")


def test_no_safetensors(directory):
    config = config_for(directory)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    assert "has no *.safetensors" in complaint(directory, config)
    (directory / "pytorch_model.bin").touch()
    assert "it has pytorch_model.bin: save the model again with safe_serialization=True" in complaint(directory, config)


def test_every_key_of_another_model_is_named(directory):
    config = config_for(directory)
    config.model = tiny_config().model
    config.model.vocab_size = 64
    with pytest.raises(ConfigurationError) as error:
        _open(config, directory, None)
    problems = {problem.key: problem for problem in error.value.problems}
    assert problems.keys() == {
        "model.num_layers",
        "model.kv_channels",
        "model.norm_epsilon",
        "model.vocab_size",
        "model.adaln_init",
    }
    assert (problems["model.num_layers"].found, problems["model.num_layers"].valid) == ("2", f"4, as in {directory}")
    assert problems["model.vocab_size"].valid == f"at least {VOCAB_SIZE}, the rows of {directory}"
    assert problems["model.adaln_init"].valid.startswith("identity, because")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_base", 5e5),
        ("rope_scaling", "llama3"),
        ("qk_norm", True),
        ("qkv_bias", True),
        ("tie_embeddings", True),
        ("num_query_groups", 2),
    ],
)
def test_a_switch_that_changes_the_function_is_a_problem(directory, field, value):
    config = config_for(directory)
    setattr(config.model, field, value)
    with pytest.raises(ConfigurationError) as error:
        _open(config, directory, None)
    assert [problem.key for problem in error.value.problems] == [f"model.{field}"]


def test_equal_sizes_may_be_said_in_two_ways(directory):
    config = config_for(directory)
    config.model.num_query_groups = config.model.kv_channels = None
    assert _open(config, directory, None)
