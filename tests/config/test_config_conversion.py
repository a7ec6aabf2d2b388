"""Conversion of plain trees to dataclasses: types, unknown and missing keys, YAML written and read back."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.config.config_trees import TREE, set_key
from w1train.config.constraints import LARGEST_FLOAT
from w1train.config.errors import NOT_GIVEN, ConfigurationError, Problem
from w1train.config.from_tree import config_from_tree
from w1train.config.schema import Config, StageConfig
from w1train.config.serialization import ABSENT, Difference, config_differences, config_from_yaml, config_to_yaml, flatten

SECTIONS = ["", "model", "data", "diffusion", "parallel", "optimizer", "schedule", "schedule.stages.warmup", "training", "sampling"]
KNOWN = set(flatten(config_from_tree(TREE).config)) | {field.name for field in dataclasses.fields(Config)}
NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,15}", fullmatch=True)


def problems_of(changes: dict[str, Any]) -> list[Problem]:
    tree = copy.deepcopy(TREE)
    for key, value in changes.items():
        set_key(tree, key, value)
    return config_from_tree(tree).problems


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("schedule.stages.stable.tokens", 1e9, 10**9),
        ("schedule.stages.stable.tokens", 2.3e12, 2_300_000_000_000),
        ("model.norm_epsilon", 1, 1.0),
        ("model.kv_channels", None, None),
        ("sampling.prompts", [], []),
        ("validation.timesteps", [1, 0.5], [1.0, 0.5]),
        ("training.precision", "fp32", "fp32"),
        ("parallel.sequence", True, True),
    ],
)
def test_valid_values(key: str, given: Any, expected: Any) -> None:
    tree = copy.deepcopy(TREE)
    set_key(tree, key, given)
    conversion = config_from_tree(tree)
    assert conversion.problems == []
    value = flatten(conversion.config)[key]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("key", "given", "valid", "suggestion"),
    [
        ("model.num_layers", "abc", "an integer", None),
        ("model.num_layers", "12", "an integer", "without quotes: model.num_layers=12"),
        ("model.num_layers", 2.5, "an integer", "model.num_layers=2"),
        ("model.num_layers", 1e23, "an integer", None),
        ("model.num_layers", float("inf"), "an integer", None),
        ("model.num_layers", True, "an integer", None),
        ("model.num_layers", None, "an integer", None),
        ("model.num_layers", [4], "an integer", None),
        ("model.kv_channels", "12", "an integer or null", "without quotes: model.kv_channels=12"),
        ("model.norm_epsilon", False, "a number", None),
        ("model.norm_epsilon", 10**400, "a number", None),
        ("data.read_timeout", 2**63, "a number (this number is too large)", None),
        ("data.prefetch", 1e300, "an integer (this number is too large)", None),
        ("model.norm_epsilon", "1e-6", "a number", "without quotes: model.norm_epsilon=1e-6"),
        ("parallel.sequence", 1, "true or false", None),
        ("parallel.sequence", "yes", "true or false", "parallel.sequence=true"),
        ("name", 1e3, "a string", "the text in quotes"),
        ("name", True, "a string", "the text in quotes"),
        ("name", 7, "a string", """in quotes; on a command line: name='"7"'"""),
        ("training.precision", "bf61", "one of: fp32, bf16", "did you mean bf16?"),
        ("training.precision", 8, "one of: fp32, bf16", None),
        ("training.precision", None, "one of: fp32, bf16", None),
        ("sampling.prompts", "def", "a list, each item a string", None),
        ("model", 3, "a mapping with the keys vocab_size", None),
        ("schedule.stages", [1], "a mapping from names", None),
        ("schedule.stages.stable", 5, "a mapping with the keys tokens, learning_rate, global_batch_size, style", None),
    ],
)
def test_wrong_types(key: str, given: Any, valid: str, suggestion: str | None) -> None:
    (problem,) = problems_of({key: given})
    assert problem.key == key
    assert problem.valid.startswith(valid)
    assert problem.suggestion == suggestion


def test_wrong_list_items_are_named_by_index() -> None:
    problems = problems_of({"validation.timesteps": [0.5, "x", True]})
    assert [problem.key for problem in problems] == ["validation.timesteps[1]", "validation.timesteps[2]"]


def test_no_override_of_a_list_item_is_suggested() -> None:
    changes = {"validation.timesteps": ["0.5"], "validation.block_sizes": [2.5], "sampling.prompts": [7]}
    suggestions = [problem.suggestion for problem in problems_of(changes)]
    assert suggestions == ["without quotes: 0.5", "2", "the text in quotes"]


def test_names_of_mappings_must_be_strings() -> None:
    (problem,) = problems_of({"schedule.stages": {1: {"tokens": 5, "learning_rate": 0.1}}})
    assert "the name 1" in problem.found


def test_missing_keys_are_reported_and_a_missing_section_once() -> None:
    tree = copy.deepcopy(TREE)
    del tree["model"], tree["data"]["tokenizer"], tree["schedule"]["stages"]["stable"]["tokens"]
    problems = config_from_tree(tree).problems
    assert [problem.key for problem in problems] == ["model", "data.tokenizer", "schedule.stages.stable.tokens"]
    assert {problem.found for problem in problems} == {NOT_GIVEN}


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("model.hiden_size", "did you mean model.hidden_size?"),
        ("model.Hidden_Size", "did you mean model.hidden_size?"),
        ("modle.hidden_sise", "did you mean model.hidden_size?"),
        (
            "optm.rate",
            "did you mean optimizer? Its keys: name, beta1, beta2, momentum, update_scale, epsilon, weight_decay, clip_grad, "
            "rate_multipliers",
        ),
        ("hidden_size", "did you mean model.hidden_size?"),
        ("training.mask_token_idd", "did you mean diffusion.mask_token_id?"),
        ("schedule.stages.warmup.learning_rat", "did you mean schedule.stages.warmup.learning_rate?"),
        ("optimizer.learning_rat", "did you mean schedule.stages.NAME.learning_rate?"),
        ("qqqq", None),
    ],
)
def test_unknown_keys_are_suggested(key: str, suggestion: str | None) -> None:
    (problem,) = problems_of({key: 1})
    assert (problem.key, problem.suggestion) == (key, suggestion)


@given(
    st.dictionaries(
        st.tuples(st.sampled_from(SECTIONS), NAMES, st.lists(NAMES, max_size=2).map(tuple)), st.integers(), min_size=1, max_size=5
    )
)
def test_every_unknown_key_is_reported_in_full(wrong: dict[tuple[str, str, tuple[str, ...]], int]) -> None:
    keys = [".".join(filter(None, [section, name, *rest])) for section, name, rest in wrong]
    # A key below another key would replace its value, and a known key is not wrong.
    keys = [key for key in keys if not any(other != key and other.startswith(f"{key}.") for other in keys)]
    keys = [key for key in keys if not any(key == known or f"{known}.".startswith(f"{key}.") for known in KNOWN)]
    keys = [key for key in keys if key.split(".")[0] not in {"name", "runs_dir"} and key.rpartition(".")[0] not in KNOWN]
    problems = problems_of(dict.fromkeys(keys, 1))
    assert sorted(problem.key for problem in problems) == sorted(set(keys))


def test_the_error_numbers_every_problem() -> None:
    tree = copy.deepcopy(TREE)
    wrong = {"name": "a b", "model.hiden_size": 1, "model.num_layers": "x", "parallel.tensor": 3, "training.micro_batch_size": 5}
    for key, value in {**wrong, "sampling.block_size": 7, "schedule.stages.stable.tokens": 0}.items():
        set_key(tree, key, value)
    text = config_text(tree)
    with pytest.raises(ConfigurationError) as caught:
        config_from_yaml(text)
    # The number of layers is unknown, but all rules that do not need it have been checked.
    assert {problem.key for problem in caught.value.problems} == {
        "name",
        "model.hiden_size",
        "model.num_layers",
        "parallel.tensor",
        "training.global_batch_size",
        "sampling.block_size",
        "schedule.stages.stable.tokens",
    }
    lines = str(caught.value).splitlines()
    count = len(caught.value.problems)
    assert lines[0] == f"{count} problems in the configuration:"
    assert f"{count}. {caught.value.problems[-1].key}" in lines


def config_text(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree)


PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
POSITIVE = st.floats(min_value=0, max_value=LARGEST_FLOAT, exclude_min=True, allow_nan=False)
VALID_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "name": st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True),
    "runs_dir": PATHS,
    "data.validation": st.none() | PATHS,
    "model.rope_base": POSITIVE,
    "model.norm_epsilon": POSITIVE,
    "model.qk_norm": st.booleans(),
    "model.adaln_init": st.sampled_from(["zero", "identity"]),
    "optimizer.beta1": st.floats(0, 1, exclude_max=True),
    "training.seed": st.integers(0, 2**63 - 1),
    "validation.timesteps": st.integers(1, 8).map(lambda bins: [(index + 0.5) / bins for index in range(bins)]),
    "sampling.prompts": st.lists(st.text()),
    "schedule.stages.stable.tokens": st.integers(1, 10**18),
    "logging.peak_tflops": st.none() | POSITIVE,
}


@example({"name": "0E0"})
@example({"sampling.prompts": ["\x85", "a\u2028b", "c\r\nd"]})
@given(st.fixed_dictionaries({}, optional=VALID_VALUES))
def test_yaml_reads_back_equal(changes: dict[str, Any]) -> None:
    tree = copy.deepcopy(TREE)
    for key, value in changes.items():
        set_key(tree, key, value)
    config = config_from_tree(tree).config
    text = config_to_yaml(config)
    assert config_from_yaml(text) == config
    assert config_to_yaml(config_from_yaml(text)) == text


@given(name=st.from_regex(r"[0-9][0-9a-fA-FxXoO_]{38,90}", fullmatch=True))
@settings(max_examples=15)
@example(name="09f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a0")
@example(name="0x" + 62 * "f")
@example(name=64 * "7")
@example(name=40 * "1" + "e5")
def test_the_name_of_a_run_may_be_a_hash(name: str) -> None:
    config = config_from_tree({**TREE, "name": name}).config
    assert config_from_yaml(config_to_yaml(config)) == config


def test_yaml_files_may_be_written_by_hand(tmp_path: Path) -> None:
    text = config_text(TREE).replace("learning_rate: 0.001", "learning_rate: 1e-3").replace("tokens: 1000", "tokens: 1e3")
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    assert "1e-3" in text
    assert config_from_yaml(path) == config_from_tree(TREE).config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: a\nname: b\n", "'name' is given twice"),
        (b"name: [a\n", "not YAML"),
        (b"", "NoneType at the top"),
        (b"- 1\n", "list at the top"),
        (b"name: \xff\xfe\n", "not YAML"),
        (b"name: " + 5000 * b"7" + b"\n", "a number of 5000 characters is too long"),
        (b"name: 0x" + 5000 * b"f" + b"\n", "a number of 5002 characters is too long"),
        (b"name: 1" + 2500 * b":1" + b"\n", "a number of 5001 characters is too long"),
        (b"name: 0b" + 50 * b"1_" + b"\n", "a number of 102 characters is too long"),
        (b"name: " + 5000 * b"7" + b"e5\n", "name"),
        (b"name: !!python/object/apply:os.getcwd []\n", "the tag .* is not supported"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message) as caught:
        config_from_yaml(path)
    assert str(path) in str(caught.value)


def test_flatten_and_differences() -> None:
    old = config_from_tree(TREE).config
    tree = copy.deepcopy(TREE)
    tree["model"]["kv_channels"] = None
    tree["schedule"]["stages"]["cooldown"] = tree["schedule"]["stages"].pop("decay")
    new = config_from_tree(tree).config
    assert flatten(old)["schedule.stages.warmup.style"] == "linear"
    assert flatten(old)["sampling.prompts"] == [""]
    assert config_differences(old, old) == []
    differences = config_differences(old, new)
    assert differences[0] == Difference("model.kv_channels", 12, None)
    assert Difference("schedule.stages.cooldown.tokens", ABSENT, 200) in differences
    assert Difference("schedule.stages.decay.tokens", 200, ABSENT) in differences
    # One difference is kv_channels. Every field of the renamed stage differs twice, except its two empty mappings.
    assert len(differences) == 1 + 2 * (len(dataclasses.fields(StageConfig)) - 2)
