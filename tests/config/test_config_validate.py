"""Ranges of single values, and rules between keys."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.config_trees import TREE, set_key
from tests.slow import slow_except
from w1train.config import rules
from w1train.config.constraints import LARGEST_FLOAT, LARGEST_INTEGER, Range
from w1train.config.field_types import constraint_of, field_types, scalar_type, without_null
from w1train.config.from_tree import Conversion, config_from_tree
from w1train.config.rules.validate import RULES, validate, validate_conversion
from w1train.config.schema import Config

MakeConfig = Callable[..., Config]


def numeric_types(annotation: Any = Config, key: str = "") -> dict[str, Any]:
    """Return the types of all numbers of the schema by key; ``*`` stands for a name of a mapping, ``[*]`` for an index of a list."""
    annotation = without_null(annotation)
    if dataclasses.is_dataclass(annotation):
        types = [numeric_types(inner, f"{key}.{name}".lstrip(".")) for name, inner in field_types(annotation).items()]
        return {full_key: inner for inner_types in types for full_key, inner in inner_types.items()}
    if get_origin(annotation) is dict:
        return numeric_types(get_args(annotation)[1], f"{key}.*")
    if get_origin(annotation) is list:
        return numeric_types(get_args(annotation)[0], f"{key}[*]")
    return {key: annotation} if scalar_type(annotation) in (int, float) else {}


RANGES: dict[str, Any] = {key: constraint_of(annotation) for key, annotation in numeric_types().items()}


def test_every_numeric_field_has_a_range() -> None:
    assert len(RANGES) > 80
    assert [key for key, valid in RANGES.items() if not isinstance(valid, Range)] == []


def test_every_rule_is_registered() -> None:
    """A rule that is in no list is never checked."""
    modules = [importlib.import_module(f"{rules.__name__}.{module.name}") for module in pkgutil.iter_modules(rules.__path__)]
    defined = {value for module in modules for name, value in vars(module).items() if name.endswith("_rule") and inspect.isfunction(value)}
    assert len(defined) > 30
    assert {inspect.unwrap(rule) for rule in RULES} == defined


def test_the_base_is_valid(make_config: MakeConfig) -> None:
    assert validate(make_config()) == []


@pytest.mark.parametrize("pattern", RANGES)
def test_values_outside_a_range_are_reported(make_config: MakeConfig, pattern: str) -> None:
    valid = RANGES[pattern]
    is_float = scalar_type(numeric_types()[pattern]) is float
    outside: list[float] = [valid.minimum - 1, *([valid.minimum] if not valid.includes_minimum else [])]
    if is_float:
        outside += [math.nan, math.inf]
    if valid.maximum != math.inf:
        outside += [valid.maximum + 1, *([valid.maximum] if not valid.includes_maximum else [])]
    for value in outside:
        key = pattern.replace("*", "stable").removesuffix("[stable]")
        inside = 0.5 if valid.maximum == 1 else 1
        required = {"data.blend.stable.prefix": "x"} if pattern.startswith("data.blend") else {}
        config = make_config({**required, key: [inside, value] if pattern.endswith("]") else value})
        reported = [problem.key for problem in validate(config)]
        assert (f"{key}[1]" if pattern.endswith("]") else key) in reported, (pattern, value)


@pytest.mark.parametrize("value", slow_except([10**400], [2**63, 10**400, 1e300]))
@pytest.mark.parametrize("pattern", RANGES)
def test_numbers_too_large_for_anything_are_reported(pattern: str, value: float) -> None:
    """They are reported together with every other problem, whatever rules between keys compute from them."""
    tree, key = copy.deepcopy(TREE), pattern.replace("*", "stable").removesuffix("[stable]")
    if pattern.startswith("data.blend"):
        set_key(tree, "data.blend.stable.prefix", "x")
    set_key(tree, key, [value] if pattern.endswith("]") else value)
    set_key(tree, "name", "a b")
    conversion = config_from_tree(tree)
    reported = [problem.key for problem in conversion.problems + validate_conversion(conversion)]
    assert (f"{key}[0]" if pattern.endswith("]") else key) in reported
    assert "name" in reported


@pytest.mark.parametrize(
    ("key", "value", "valid"),
    [
        ("data.read_timeout", 1e10, "a number > 0 and <= 31536000"),
        ("health.start_timeout", 1e300, "a number > 0 and <= 31536000"),
        ("model.condition_size", 2**63 - 1, "a number >= 1 and <= 1048576"),
        ("data.num_workers", 1025, "a number >= 0 and <= 1024"),
        ("data.prefetch", 10_001, "a number >= 1 and <= 10000"),
        ("logging.num_t_bins", 10_001, "a number >= 1 and <= 10000"),
        ("logging.interval", 2**63, "a number >= 1 and <= 9223372036854775807"),
        ("optimizer.clip_grad", 1e39, "a number >= 0 and <= 1e+38"),
        ("optimizer.clip_grad", math.inf, "a finite number >= 0"),
        ("optimizer.clip_grad", math.nan, "a finite number >= 0"),
        ("optimizer.clip_grad", -1.0, "a number >= 0"),
    ],
)
def test_a_bound_is_said_where_it_is_crossed(make_config: MakeConfig, key: str, value: float, valid: str) -> None:
    (problem,) = validate(make_config({key: value}))
    assert (problem.key, problem.valid) == (key, valid)


def test_the_largest_numbers_are_allowed(make_config: MakeConfig) -> None:
    assert validate(make_config({"logging.interval": LARGEST_INTEGER, "optimizer.clip_grad": LARGEST_FLOAT})) == []


@pytest.mark.parametrize("digits", [18, 400])
def test_divisors_of_an_enormous_number_are_found_soon(make_config: MakeConfig, digits: int) -> None:
    problems = validate(make_config({"model.num_attention_heads": 10**digits, "model.num_query_groups": 3}))
    valid = [problem.valid for problem in problems if problem.key == "model.num_query_groups"]
    assert len(valid) == 1
    assert "1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 40, 50, ..." in valid[0]


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"name": "a/b"}, "name", "directory name"),
        ({"name": ".."}, "name", "directory name"),
        ({"name": ""}, "name", "directory name"),
        ({"runs_dir": ""}, "runs_dir", "a path"),
        ({"data.validation": ""}, "data.validation", "or null"),
        ({"data.train": None}, "data.train", "or several corpora in data.blend"),
        ({"data.blend": {"a": {"prefix": "x"}}}, "data.train", "null with data.blend"),
        (
            {"data.train": None, "data.blend": {"a": {"prefix": "x", "weight": 0}}},
            "data.blend",
            "stage warmup, stable, decay has nothing to read",
        ),
        ({"data.train": None, "data.blend": {"a": {"prefix": "x"}, "b": {"prefix": "x"}}}, "data.blend.b.prefix", "another dataset"),
        ({"data.train": None, "data.blend": {"a": {"prefix": ""}}}, "data.blend.a.prefix", "a path"),
        ({"schedule.stages.stable.blend": {"cod": 1.0}}, "schedule.stages.stable.blend.cod", "which is empty"),
        (
            {"schedule.stages.stable.blend": {"a": 1.0}, "schedule.stages.stable.train": "y"},
            "schedule.stages.stable.blend",
            "one or the other",
        ),
        ({"data.validation": None, "data.validation_sets": {"a": "x"}}, "data.validation_sets", "empty without data.validation"),
        ({"data.align": 4}, "data.align", "1 with data.packing=cut"),
        ({"data.fill": "block", "data.packing": "best_fit"}, "data.align", "the block size with data.fill=block"),
        ({"data.fill": "sample", "data.packing": "best_fit"}, "data.fill", "none or block with best_fit"),
        ({"data.fill": "batch"}, "data.fill", "none with data.packing=cut"),
        ({"data.fill": "sample", "data.packing": "separate", "data.eos": "drop"}, "data.eos", "keep with data.fill"),
        ({"data.align": 5, "data.packing": "best_fit"}, "data.align", "a divisor of data.sequence_length (64)"),
        ({"data.loader": "dali", "data.num_workers": 0}, "data.num_workers", "at least 1 with data.loader=dali"),
        ({"data.train": "s3://bucket/x"}, "data.cache_directory", "the files of data.train"),
        ({"model.num_query_groups": 3}, "model.num_query_groups", "1, 2, 4"),
        ({"model.num_query_groups": 8}, "model.num_query_groups", "1, 2, 4"),
        ({"model.kv_channels": 7}, "model.kv_channels", "even"),
        ({"model.kv_channels": None, "model.hidden_size": 36}, "model.kv_channels", "even"),
        ({"model.kv_channels": None, "model.hidden_size": 30}, "model.num_attention_heads", "1, 2, 3, 5, 6, 10, 15, 30"),
        ({"model.timestep_frequency_size": 5}, "model.timestep_frequency_size", "even"),
        ({"data.sequence_length": 4097}, "data.sequence_length", "4096"),
        ({"diffusion.mask_token_id": 96}, "diffusion.mask_token_id", "below model.vocab_size (96)"),
        ({"diffusion.t_min": 0}, "diffusion.t_min", "inverse_t divides by t"),
        ({"diffusion.t_min": 0.5, "diffusion.t_max": 0.5}, "diffusion.t_min", "below diffusion.t_max (0.5)"),
        ({"diffusion.num_strata": 48}, "diffusion.num_strata", "power of two"),
        ({"diffusion.block_size": 24}, "diffusion.block_size", "a divisor of data.sequence_length (64)"),
        ({"schedule.stages.stable.diffusion": {"block_size": 24}}, "schedule.stages.stable.diffusion.block_size", "a divisor"),
        ({"schedule.stages.stable.diffusion": {"t_min": -1.0}}, "schedule.stages.stable.diffusion.t_min", ">= 0"),
        ({"schedule.stages.stable.diffusion": {"mask_token_id": 3}}, "schedule.stages.stable.diffusion.mask_token_id", "whole run"),
        ({"schedule.stages.stable.diffusion": {"timestep_per": "block"}}, "diffusion.block_size in stage stable", "a number of tokens"),
        ({"schedule.stages.stable.rewarm_tokens": 1001}, "schedule.stages.stable.rewarm_tokens", "at most the stage's 1000"),
        ({"diffusion.noisy_attention": "causal"}, "diffusion.noisy_attention", "below data.sequence_length (64)"),
        ({"diffusion.autoregressive_weight": 1.0, "diffusion.block_size": 16}, "diffusion.clean_attention", "token_causal"),
        (
            {
                "diffusion.autoregressive_weight": 1.0,
                "diffusion.block_size": 16,
                "diffusion.clean_attention": "token_causal",
                "diffusion.normalizer": "samples",
            },
            "diffusion.normalizer",
            "tokens or masked_tokens",
        ),
        (
            {"diffusion.autoregressive_weight": 1.0, "diffusion.clean_attention": "token_causal"},
            "diffusion.autoregressive_weight",
            "a diffusion.block_size below",
        ),
        (
            {"diffusion.complementary": True, "training.global_batch_size": 9, "training.micro_batch_size": 1},
            "training.global_batch_size",
            "even",
        ),
        (
            {"diffusion.coupled_draws": True, "training.global_batch_size": 9, "training.micro_batch_size": 1},
            "training.global_batch_size",
            "an even number with diffusion.coupled_draws",
        ),
        ({"diffusion.complementary": True, "diffusion.coupled_draws": True}, "diffusion.complementary", "at the same t"),
        ({"diffusion.complementary": True, "diffusion.antithetic": True}, "diffusion.antithetic", "t and 1 - t"),
        ({"diffusion.complementary": True, "diffusion.t_min": 0.3, "diffusion.t_max": 0.4}, "diffusion.t_max", "at least 1 - "),
        ({"diffusion.complementary": True, "diffusion.mask_count": "exact"}, "diffusion.mask_count", "would have no masked token"),
        ({"diffusion.mask_count": "exact", "diffusion.noise_schedule": "cosine"}, "diffusion.mask_count", "noise_schedule=linear"),
        ({"diffusion.mask_count": "exact", "diffusion.num_timesteps": 10}, "diffusion.num_timesteps", "need not be a step"),
        ({"diffusion.attention_annealing": "extent", "diffusion.annealing_tokens": 9}, "diffusion.attention_annealing", "in the stage"),
        (
            {"schedule.stages.stable.diffusion": {"attention_annealing": "extent", "annealing_tokens": 1001}},
            "schedule.stages.stable.diffusion.annealing_tokens",
            "at most the stage's 1000",
        ),
        (
            {"schedule.stages.stable.diffusion": {"attention_annealing": "extent"}},
            "diffusion.annealing_tokens in stage stable",
            "a number of tokens",
        ),
        ({"validation.block_sizes": [24]}, "validation.block_sizes[0]", "a divisor of data.sequence_length (64)"),
        ({"schedule.stages": {}}, "schedule.stages", "at least one"),
        ({"schedule.stages": {"a.b": {"tokens": 1, "learning_rate": 1}}}, "schedule.stages.a.b", "letters"),
        ({"validation.timesteps": []}, "validation.timesteps", "at least one"),
        ({"validation.timesteps": [0.1, 0.5]}, "validation.timesteps", "midpoints of 2 equal bins"),
        ({"sampling.block_size": 32, "sampling.num_steps": 6}, "sampling.num_steps", "a multiple of 4, the number of blocks"),
        ({"sampling.threshold": 0.9, "sampling.remasking": "random"}, "sampling.remasking", "low_confidence"),
        ({"training.seed": 1 << 63}, "training.seed", "<= 9223372036854775807"),
        ({"diffusion.num_strata": 1 << 21}, "diffusion.num_strata", "<= 1048576"),
        ({"sampling.block_size": 48}, "sampling.block_size", "divisor of sampling.num_tokens (128)"),
        ({"sampling.interval": 1, "sampling.prompts": []}, "sampling.prompts", "at least one"),
        ({"sampling.interval": 1, "sampling.chat_template": "built_in"}, "sampling.prompts", "prompts with a text"),
        ({"sampling.interval": 1, "model.max_sequence_length": 100}, "sampling.num_tokens", "at most"),
        ({"checkpoint.keep_best": 2, "checkpoint.interval": 1000}, "checkpoint.keep_best", "0 without data.validation"),
        (
            {"checkpoint.keep_best": 2, "data.validation": "v", "checkpoint.interval": 250, "validation.interval": 100},
            "checkpoint.interval",
            "a multiple of validation.interval (100)",
        ),
        ({"checkpoint.average_at_end": True}, "checkpoint.average_at_end", "keep_best of at least 2"),
        ({"checkpoint.keep_every": 150, "checkpoint.interval": 100}, "checkpoint.keep_every", "a multiple of checkpoint.interval"),
        ({"checkpoint.upload": "bucket/runs"}, "checkpoint.upload", "a URL that fsspec knows"),
        (
            {"checkpoint.average_at_end": True, "checkpoint.keep_best": 1, "data.validation": "v"},
            "checkpoint.average_at_end",
            "keep_best of at least 2",
        ),
        ({"parallel.tensor": 3, "model.vocab_size": 99, "model.ffn_hidden_size": 63}, "parallel.tensor", "num_attention_heads (4)"),
        ({"parallel.tensor": 2, "model.num_query_groups": 1}, "parallel.tensor", "num_query_groups (1)"),
        ({"parallel.tensor": 2, "model.ffn_hidden_size": 63}, "parallel.tensor", "ffn_hidden_size (63)"),
        ({"parallel.tensor": 2, "model.vocab_size": 97}, "parallel.tensor", "vocab_size (97)"),
        ({"parallel.sequence": True}, "parallel.sequence", "false when parallel.tensor is 1"),
        ({"parallel.sequence": True, "parallel.tensor": 4, "data.sequence_length": 62}, "data.sequence_length", "multiple of"),
        ({"parallel.pipeline": 3}, "parallel.pipeline", "1, 2, 4"),
        (
            {"parallel.recompute": "full", "parallel.recompute_num_layers": 3, "parallel.pipeline": 2},
            "parallel.recompute_num_layers",
            "1 to 2",
        ),
        (
            {
                "parallel.pipeline": 2,
                "parallel.virtual_pipeline": 2,
                "parallel.num_layers_in_first_stage": 2,
                "parallel.num_layers_in_last_stage": 2,
            },
            "parallel.virtual_pipeline",
            "1 when the layers of both stages",
        ),
        ({"training.micro_batch_size": 3}, "training.global_batch_size", "multiple of training.micro_batch_size (3)"),
    ],
)
def test_rules(make_config: MakeConfig, changes: dict[str, Any], key: str, words: str) -> None:
    (problem,) = validate(make_config(changes))
    assert problem.key == key
    assert words in problem.valid


PATH_CHANGES: dict[str, dict[str, Any]] = {
    "runs_dir": {},
    "data.train": {},
    "data.blend.a.prefix": {"data.train": None},
    "data.validation": {},
    "data.validation_sets.a": {"data.validation": "x"},
    "data.tokenizer": {},
    "data.cache_directory": {},
    "schedule.stages.stable.train": {},
    "training.initial_weights": {},
    "checkpoint.upload": {},
}


@pytest.mark.parametrize(("path", "words"), [("", ""), ("s3://a\0b", "without the character NUL"), ("s3://a\udcffb", "in UTF-8")])
@pytest.mark.parametrize("key", PATH_CHANGES)
def test_what_is_no_path_is_reported(make_config: MakeConfig, key: str, path: str, words: str) -> None:
    config = make_config({"data.cache_directory": "x", **PATH_CHANGES[key], key: path})
    (problem,) = validate(config)
    assert (problem.key, problem.found) == (key, repr(path))
    assert words in problem.valid


def test_paths_may_have_any_other_character(make_config: MakeConfig) -> None:
    assert validate(make_config({"runs_dir": "a b/\n\x01é\U0001f600", "data.tokenizer": "\u2028"})) == []


def test_blocks_of_block_diffusion_need_not_divide(make_config: MakeConfig) -> None:
    changes = {"sampling.block_size": 48, "sampling.num_steps": 5}
    assert validate(make_config({**changes, "diffusion.block_size": 16})) == []
    assert [problem.key for problem in validate(make_config({**changes, "diffusion.block_size": 64}))] == ["sampling.block_size"]
    stages = {"schedule.stages": {"all": {"tokens": 1000, "learning_rate": 1.0e-3, "diffusion": {"block_size": 16}}}}
    assert [problem.key for problem in validate(make_config({**changes, **stages}))] == ["sampling.block_size"]
    by_block = {"diffusion.block_size": 16, "schedule.stages.decay.diffusion": {"block_size": 64}}
    assert [problem.key for problem in validate(make_config({**changes, **by_block}))] == ["sampling.block_size in stage decay"]
    one_stream = {"sampling.block_size": 32, "sampling.num_steps": 5, "sampling.threshold": 0.9}
    assert validate(make_config(one_stream)) == []


def test_the_pipeline_rules_are_reported_together(make_config: MakeConfig) -> None:
    """Three of four layers are in the first of three stages: one layer is left for two stages, and three layers are no two equal chunks."""
    changes = {"parallel.pipeline": 3, "parallel.virtual_pipeline": 2, "parallel.num_layers_in_first_stage": 3}
    assert [problem.key for problem in validate(make_config(changes))] == ["parallel.pipeline", "parallel.virtual_pipeline"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model.conditioning": "none", "model.adaln_init": "identity"},
        {"diffusion.t_min": 0, "diffusion.weight": "constant"},
        {"diffusion.num_strata": 1},
        {"diffusion.num_strata": 1 << 20},
        {"validation.timesteps": [0.75, 0.25]},
        {"training.seed": (1 << 63) - 1},
        {"sampling.num_tokens": 5000},
        {"parallel.tensor": 4, "parallel.sequence": True, "parallel.pipeline": 4},
        {"model.kv_channels": None},
        {"optimizer.clip_grad": 0, "data.num_workers": 0, "training.seed": 0},
    ],
)
def test_what_is_allowed(make_config: MakeConfig, changes: dict[str, Any]) -> None:
    assert validate(make_config(changes)) == []


@given(st.integers(1, 24), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 48))
def test_the_layout_over_a_world(world_size: int, tensor: int, pipeline: int, micro: int, batch: int) -> None:
    tree = TREE | {"parallel": {"tensor": tensor, "pipeline": pipeline}}
    tree |= {"training": {"micro_batch_size": micro, "global_batch_size": batch}}
    problems = validate(config_from_tree(tree).config, world_size)
    replicas, rest = divmod(world_size, tensor * pipeline)
    expected = {"parallel.tensor"} if rest else set()
    if batch % micro or (not rest and batch % (micro * replicas)):
        expected.add("training.global_batch_size")
    assert {problem.key for problem in problems} == expected
    assert len(problems) == len(expected)


def test_the_world_size_rules_say_what_would_fit(make_config: MakeConfig) -> None:
    (problem,) = validate(make_config({"parallel.tensor": 4}), world_size=6)
    assert "1, 2, 3, 6" in problem.valid
    (problem,) = validate(make_config(), world_size=3)
    assert "4 x 3 = 12" in problem.valid
    assert problem.suggestion == "12 or 24"


def test_values_beside_unset_fields_are_checked(make_config: MakeConfig) -> None:
    """Values of a stage are checked even if the run's own diffusion has an unset field."""
    stages = {"stable": {"tokens": 1000, "learning_rate": 1.0e-3, "diffusion": {"num_strata": 0}}}
    conversion = config_from_tree(TREE | {"diffusion": {"block_size": "x", "t_min": -1}, "schedule": {"stages": stages}})
    assert [problem.key for problem in conversion.problems] == ["diffusion.block_size"]
    assert [problem.key for problem in validate_conversion(conversion)] == [
        "diffusion.t_min",
        "schedule.stages.stable.diffusion.num_strata",
    ]


def test_rules_with_unset_fields_are_left_out_and_others_are_not() -> None:
    conversion = config_from_tree(TREE | {"training": {"global_batch_size": 16}, "name": "a b"})
    assert [problem.key for problem in conversion.problems] == ["training.micro_batch_size"]
    assert [problem.key for problem in validate_conversion(conversion)] == ["name"]


def test_a_mistake_in_a_rule_is_not_taken_for_an_unset_field(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_rule(config: Config) -> Any:
        yield config.nonsense  # type: ignore[attr-defined]

    monkeypatch.setattr("w1train.config.rules.validate.RULES", (broken_rule,))
    with pytest.raises(AttributeError, match="nonsense"):
        validate_conversion(Conversion(make_config(), [], complete=False))
