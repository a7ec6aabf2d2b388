"""Names that people type from habit, and the keys that messages suggest in their place."""

from __future__ import annotations

import copy
import re
from typing import get_args

import pytest
import yaml

from tests.config.config_trees import TREE, set_key
from w1train.config.command_line import parse_command_line
from w1train.config.errors import ConfigurationError
from w1train.config.field_types import field_types, scalar_type
from w1train.config.from_tree import all_keys, config_from_tree
from w1train.config.schema import Config
from w1train.config.synonyms import SYNONYMS, VALUE_SYNONYMS

KEYS = {key for keys in all_keys().values() for key in keys}
LEARNING_RATE = "schedule.stages.NAME.learning_rate"
TOKENS = "schedule.stages.NAME.tokens"

# What is typed, and what the suggestion begins with.
COMMON = {
    "lr=0.001": f"did you mean {LEARNING_RATE}=0.001? ",
    "learning_rate=0.001": f"did you mean {LEARNING_RATE}=0.001? ",
    "optimizer.lr=0.001": f"did you mean {LEARNING_RATE}=0.001? ",
    "schedule.stages.warmup.lr=0.001": "did you mean schedule.stages.warmup.learning_rate=0.001? ",
    "schedule.stages.warmup.steps=10": "did you mean schedule.stages.warmup.tokens? ",
    "max_steps=100": f"did you mean {TOKENS}? ",
    "num_steps=100": f"did you mean {TOKENS}? ",
    "steps=100": f"did you mean {TOKENS}? ",
    "trainer.max_steps=100": f"did you mean {TOKENS}? ",
    "warmup_steps=100": f"did you mean {TOKENS}? ",
    "epochs=3": f"did you mean {TOKENS}? ",
    "tp=2": "did you mean parallel.tensor=2? ",
    "pp=2": "did you mean parallel.pipeline=2? ",
    "cp=2": "did you mean parallel.context=2? ",
    "vpp=2": "did you mean parallel.virtual_pipeline=2? ",
    "sp=true": "did you mean parallel.sequence=true? ",
    "dp=2": "The number of data-parallel ranks is ",
    "ep=2": "Mixtures of experts are not supported yet",
    "parallel.tensor_model_parallel_size=2": "did you mean parallel.tensor=2? ",
    "seq_len=512": "did you mean data.sequence_length=512? ",
    "sequence_length=512": "did you mean data.sequence_length?",
    "block_size=512": "did you mean diffusion.block_size=512? ",
    "save_interval=500": "did you mean checkpoint.interval=500? ",
    "training.save_steps=500": "did you mean checkpoint.interval=500? ",
    "output_dir=/data/runs": "did you mean runs_dir=/data/runs? ",
    "checkpoint_dir=/data/runs": "did you mean runs_dir? Checkpoints are in runs_dir/name/checkpoints",
    "grad_clip=0.5": "did you mean optimizer.clip_grad=0.5? ",
    "max_grad_norm=0.5": "did you mean optimizer.clip_grad=0.5? ",
    "dropout=0.1": "w1train has no dropout: ",
    "model.dropout=0.1": "w1train has no dropout: ",
    "compile=true": "w1train does not compile the whole model",
    "wandb=off": "did you mean logging.wandb=disabled? ",
    "wandb=offline": "did you mean logging.wandb? ",
    "wandb.project=mine": "did you mean logging.wandb_project=mine? ",
    "batch_size=32": "did you mean training.global_batch_size=32? ",
    "training.batch_size=32": "did you mean training.global_batch_size=32? ",
    "gradient_accumulation_steps=4": "did you mean training.global_batch_size? Accumulation follows from the sizes: ",
    "bf16=true": "did you mean training.precision? It is bf16 or fp32",
    "num_layers=4": "did you mean model.num_layers?",
    "hidden_size=64": "did you mean model.hidden_size?",
    "num_heads=4": "did you mean model.num_attention_heads=4? ",
    "weight_decay=0.1": "did you mean optimizer.weight_decay?",
    "beta1=0.9": "did you mean optimizer.beta1?",
    "seed=3": "did you mean training.seed=3? ",
    "eval_interval=50": "did you mean validation.interval=50? ",
    "log_interval=50": "did you mean logging.interval=50? ",
    "num_workers=2": "did you mean data.num_workers?",
    "resume=true": "did you mean checkpoint.resume_step? The same command resumes the run by itself",
    "mask_token_id=3": "did you mean diffusion.mask_token_id?",
    "sampling.steps=8": "did you mean sampling.num_steps?",
    "logging.log_interval=5": "did you mean logging.interval?",
}


def suggestion(typed: str) -> str | None:
    key, _, text = typed.partition("=")
    tree = copy.deepcopy(TREE)
    set_key(tree, key, yaml.safe_load(text) if text != "off" else text)
    (problem,) = config_from_tree(tree).problems
    return problem.suggestion


@pytest.mark.parametrize("typed", COMMON)
def test_common_names_have_a_hint(typed: str) -> None:
    assert (suggestion(typed) or "").startswith(COMMON[typed])


def test_names_of_stages_are_those_of_the_run() -> None:
    assert (suggestion("lr=0.001") or "").endswith(f"The stages of this run are: {', '.join(TREE['schedule']['stages'])}.")


def test_every_key_of_the_table_exists() -> None:
    known = {key for synonym in SYNONYMS.values() if (key := synonym.key) is not None} | VALUE_SYNONYMS.keys()
    assert known <= KEYS, known - KEYS
    sections = "|".join(name for name in all_keys() if name in Config.__dataclass_fields__)
    for synonym in SYNONYMS.values():
        named = re.findall(rf"(?<![\w/.])(?:{sections})\.\w+(?=[\s=;.,)]|$)", synonym.note)
        assert set(named) <= KEYS, synonym.note


def test_no_name_of_the_table_is_a_key_at_its_place() -> None:
    assert not SYNONYMS.keys() & {key for key in KEYS if "." in key}
    assert not SYNONYMS.keys() & set(Config.__dataclass_fields__)


def test_every_value_of_the_table_is_valid() -> None:
    for key, values in VALUE_SYNONYMS.items():
        section, _, name = key.partition(".")
        choices = get_args(scalar_type(field_types(field_types(Config)[section])[name]))
        assert set(values.values()) <= set(choices), key
        assert all(values[choice] == choice for choice in values.keys() & set(choices)), key


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("logging.wandb", "off", "did you mean disabled?"),
        ("logging.wandb", False, "did you mean disabled?"),
        ("logging.wandb", True, "did you mean online?"),
        ("training.precision", "bfloat16", "did you mean bf16?"),
        (
            "logging.wandb",
            {"project": "mine"},
            "did you mean logging.wandb_project=mine? It is the name of the project in Weights & Biases.",
        ),
    ],
)
def test_values_that_are_typed_from_habit(key: str, value: object, expected: str) -> None:
    tree = copy.deepcopy(TREE)
    set_key(tree, key, value)
    (problem,) = config_from_tree(tree).problems
    assert problem.suggestion == expected


def test_flags_that_are_keys_elsewhere() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_command_line(["recipe=demo", "--save-interval=10", "--lr"])
    first, second = caught.value.problems
    assert (first.suggestion or "").startswith("did you mean checkpoint.interval=10? ")
    assert (second.suggestion or "").startswith(f"did you mean {LEARNING_RATE}? ")
