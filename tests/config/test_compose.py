"""Recipes and overrides: packaged recipes, directories of users, and mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from w1train.config.compose import load_config
from w1train.config.errors import ConfigurationError, Problem
from w1train.config.recipe_files import groups, packaged_directory
from w1train.config.schema import Config, ModelConfig
from w1train.config.serialization import config_from_yaml, config_to_yaml, flatten

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
OPTIONS = groups([packaged_directory()])
RECIPES = OPTIONS["recipe"]
HEADER = "# @package _global_\n"


def problems_of(*overrides: str, config_dirs: tuple[str, ...] = ()) -> dict[str, Problem]:
    with pytest.raises(ConfigurationError) as caught:
        load_config(overrides, config_dirs)
    problems = {problem.key: problem for problem in caught.value.problems}
    assert len(problems) == len(caught.value.problems), caught.value
    return problems


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# Packaged recipes


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_what_they_were(recipe: str) -> None:
    """Every change of a recipe or of a default changes a file that reviewers see."""
    config = load_config([f"recipe={recipe}"])
    text, path = config_to_yaml(config), GOLDEN / f"{recipe}.yaml"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "if this is meant: UPDATE_GOLDEN=1 python -m pytest tests/config"
    assert config_from_yaml(path) == config


def test_there_is_no_golden_file_of_a_recipe_that_is_gone() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.yaml")) == RECIPES


_RECIPES_OF_SCHEDULES = {"wsd": "w1_4b", "fine_tuning": "llada_8b_sft", "fine_tuning_cosine": "llada_8b_vrpo"}


@pytest.mark.parametrize(("group", "option"), [(group, option) for group, options in OPTIONS.items() for option in options])
def test_packaged_files_set_known_keys_and_say_what_they_are(group: str, option: str) -> None:
    lines = (packaged_directory() / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    comment = lines[1] if group == "recipe" else lines[0]
    assert comment.startswith("# ")
    assert "Source" in comment
    if group != "recipe":
        # An option for 4B parameters need not fit the demo, but it has no unknown key and no value of a wrong type.
        # Some schedules need a recipe that sets the tokens of their stages, and a normaliser of masked diffusion a schedule of
        # masked diffusion.
        recipe = [f"recipe={_RECIPES_OF_SCHEDULES.get(option, 'demo')}"] if group == "schedule" else ["recipe=demo"]
        recipe += ["schedule=masked"] if group == "diffusion" else []
        assert rejected_keys([*recipe, f"{group}={option}"]) <= {
            "data.sequence_length",
            "diffusion.mask_token_id",
            "model.learns_noise_rates",
            "parallel.expert",
            "parallel.tensor",
        }


def rejected_keys(overrides: list[str]) -> set[str]:
    try:
        load_config(overrides)
    except ConfigurationError as error:
        return {problem.key for problem in error.problems}
    return set()


def num_parameters(model: ModelConfig) -> int:
    """Count the parameters in closed form; only adaLN and the timestep MLP have biases."""
    h, channels = model.hidden_size, model.kv_channels or model.hidden_size // model.num_attention_heads
    groups_ = model.num_query_groups or model.num_attention_heads
    attention = 2 * h * model.num_attention_heads * channels + 2 * h * groups_ * channels
    layer = attention + 3 * h * model.ffn_hidden_size + 2 * h
    top = h + (1 if model.tie_embeddings else 2) * model.vocab_size * h
    if model.conditioning == "adaln":
        c = model.condition_size
        layer += (c + 1) * 6 * h
        top += (c + 1) * 2 * h + (model.timestep_frequency_size + 1) * c + (c + 1) * c
    return model.num_layers * layer + top


@pytest.mark.parametrize(
    ("recipe", "billions"), [("w1_4b", 3.7390976), ("w1_4b_hybrid", 3.7390976), ("llada_8b", 8.0156), ("llada_1b", 1.4872)]
)
def test_parameter_counts_are_the_published_ones(recipe: str, billions: float) -> None:
    assert num_parameters(load_config([f"recipe={recipe}"]).model) == pytest.approx(billions * 1e9, abs=5e4)


@pytest.mark.parametrize(("recipe", "published", "tolerance"), [("sumi_7b", 7e9, 0.5e9), ("d3pm_text8", 70e6, 2e6)])
def test_parameter_counts_are_near_the_published_round_numbers(recipe: str, published: float, tolerance: float) -> None:
    assert num_parameters(load_config([f"recipe={recipe}"]).model) == pytest.approx(published, abs=tolerance)


def test_w1_has_exactly_the_published_number_of_parameters() -> None:
    assert num_parameters(load_config(["recipe=w1_4b"]).model) == 3_739_097_600


def test_llada_8b_has_the_published_schedule() -> None:
    config = load_config(["recipe=llada_8b"])
    stages = list(config.schedule.stages.values())
    assert stages[0].tokens == 2000 * config.training.global_batch_size * config.data.sequence_length
    assert [stages[0].tokens + stages[1].tokens, *(stage.tokens for stage in stages[2:])] == [1.2e12, 0.8e12, 0.3e12]
    assert [stage.learning_rate for stage in stages] == [4e-4, 4e-4, 1e-4, 1e-5]
    assert (config.diffusion.mask_token_id, config.model.conditioning) == (126336, "none")


# Overrides


def test_values_and_choices_are_overridden() -> None:
    config = load_config(
        [
            "recipe=w1_4b",
            "parallel.tensor=4",
            "+parallel.sequence=true",
            "++training.seed=7",
            "model=small",
            "model.num_layers=2",
            "model.num_attention_heads=4",
            "data.sequence_length=1024",
            "schedule.stages.stable.tokens=1e9",
            "schedule.stages.extra={tokens: 5, learning_rate: 1e-4}",
            "~schedule.stages.decay",
            "~sampling",
            "data.train='a b,c=d'",
            "name=${model.num_layers}x",
        ]
    )
    assert config.model.vocab_size == 2048
    assert config.model.num_layers == 2
    assert (config.parallel.tensor, config.parallel.sequence, config.training.seed) == (4, True, 7)
    assert list(config.schedule.stages) == ["warmup", "stable", "extra"]
    assert config.schedule.stages["stable"].tokens == 10**9
    assert config.sampling == Config.__dataclass_fields__["sampling"].default_factory()
    assert config.data.train == "a b,c=d"
    assert config.name == "2x"


def test_the_last_override_wins() -> None:
    assert load_config(["recipe=w1_4b", "name=a", "name=b", "recipe=demo"]).name == "b"


def test_interpolations_see_the_environment_and_may_be_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORPUS_PREFIX", "/corpora/code")
    config = load_config(["recipe=demo", "data.train=${oc.env:CORPUS_PREFIX}", "sampling.prompts=['\\${x}']"])
    assert (config.data.train, config.sampling.prompts) == ("/corpora/code", ["${x}"])


def test_every_mistake_is_reported_at_once() -> None:
    problems = problems_of(
        "recipe=w1_4b",
        "model=w1_4c",
        "+x=1",
        "++model.hiden_size=1",
        "optm.lr=1",
        "model.num_layers=abc",
        "training.precision=fp16",
        "schedule.stages.decay.tokens=-5",
        "logging.interval=1,2",
        "~foo",
        "~parallel.tensro",
        "name=a/b",
        "training.micro_batch_size=7",
        "data.train=(",
        "checkpoint@here.keep=3",
        "=3",
        "w1_4b",
        "parallel.pipeline=0",
    )
    assert set(problems) == {
        "model",
        "x",
        "model.hiden_size",
        "optm.lr",
        "model.num_layers",
        "training.precision",
        "schedule.stages.decay.tokens",
        "logging.interval",
        "~foo",
        "~parallel.tensro",
        "name",
        "training.global_batch_size",
        "data.train=(",
        "checkpoint@here.keep=3",
        "=3",
        "w1_4b",
        "parallel.pipeline",
    }
    assert problems["model"].suggestion == "model=w1_4b"
    assert problems["model.hiden_size"].suggestion == "did you mean model.hidden_size?"
    assert problems["~parallel.tensro"].suggestion == "did you mean ~parallel.tensor?"
    assert problems["w1_4b"].suggestion == "recipe=w1_4b"


def test_an_unknown_recipe_hides_nothing_and_invents_nothing() -> None:
    problems = problems_of("recipe=w1_4x", "training.seed=true", "parallel.tensor=5", "model.ffn_hidden_size=7168")
    assert set(problems) == {"recipe", "training.seed", "parallel.tensor"}
    assert problems["recipe"].suggestion == "recipe=w1_4b"
    assert "curriculum, d3pm_text8" in problems["recipe"].valid


def test_without_a_recipe_that_is_said_first() -> None:
    problems = problems_of()
    assert list(problems) == ["recipe", "name", "model", "data", "schedule", "training"]


@pytest.mark.parametrize("override", ["name.x=1", "model.num_layers.x=1", "sampling.prompts.0=a", "model=[small,w1_4b]", "hydra.run.dir=x"])
def test_odd_overrides_are_reported(override: str) -> None:
    key = override.partition("=")[0].replace("model.num_layers.x", "model.num_layers").removesuffix(".x").removesuffix(".0")
    assert set(problems_of("recipe=demo", override)) == {key}


@pytest.mark.parametrize("text", ["nan", "1e3", "1_000", "1.50", "True", " -inf"])
def test_what_was_typed_for_a_text_is_suggested_in_quotes(text: str) -> None:
    problem = problems_of("recipe=demo", "name=2", f"name={text}")["name"]
    assert problem.suggestion == f"""in quotes; on a command line: name='"{text.strip()}"'"""


def test_what_was_typed_before_a_mapping_is_no_suggestion() -> None:
    corpora = ["recipe=demo", "data.train=null", "data.blend.a.prefix=1e3", "data.blend={a: {prefix: 2.5}}"]
    assert problems_of(*corpora)["data.blend.a.prefix"].suggestion == "the text in quotes"
    # nam is a prefix of name but not its parent.
    assert problems_of("recipe=demo", "name=1e3", "+nam=2")["name"].suggestion == """in quotes; on a command line: name='"1e3"'"""


@pytest.mark.parametrize(
    ("override", "found", "suggestion"),
    [
        ("validation.timesteps[0]=0.5", "a key with an index", None),
        ("schedule.stages[stable].tokens=5", "a key with an index", None),
        ("+profiling.steps[]=3", "a key with an index", None),
        ("[0]=1", "the key '[0]'", None),
        ("a..b=1", "the key 'a..b'", None),
        ("~a..b", "the key '~a..b'", None),
        ("model.=1", "the key 'model.'", None),
        ("data.train=(", "text that cannot be read", """data.train='"("'"""),
        ("data.train='a'b", "text that cannot be read", None),
        ("data.train=${", "text that cannot be read", None),
        ("data.train=a\udcffb", "text that cannot be read", None),
    ],
)
def test_what_cannot_be_read_is_named(override: str, found: str, suggestion: str | None) -> None:
    problem = problems_of("recipe=demo", override)[override]
    assert problem.found.startswith(found)
    assert problem.suggestion == suggestion


@pytest.mark.parametrize("value", ["1" + 5000 * "0", f"[{5000 * '7'}]"])
def test_an_integer_that_python_does_not_read_hides_nothing(value: str) -> None:
    problems = problems_of("recipe=demo", f"profiling.steps={value}", "name=a/b")
    assert set(problems) == {"profiling.steps", "name"}
    assert problems["profiling.steps"].valid == "an integer of at most 9223372036854775807, or text in quotes"
    assert len(problems["profiling.steps"].found) < 200


@pytest.mark.parametrize("value", ["[small,w1_4b]", "[]", "''", ""])
def test_a_group_takes_one_name(value: str) -> None:
    problem = problems_of("recipe=demo", f"model={value}")["model"]
    assert problem.valid.startswith("one name: bd3lm, ")
    assert problem.suggestion is None


@pytest.mark.parametrize("name", ["mine", "1e3", "true"])
def test_a_file_of_the_name_that_was_typed_is_suggested(name: str) -> None:
    suggestion = problems_of("recipe=demo", f"model={name}")["model"].suggestion
    assert suggestion == f"a file of yours: DIR/model/{name}.yaml with --config-dir DIR"


@pytest.mark.parametrize("value", ["${nope}", "${oc.env:NO_SUCH_VARIABLE_HERE}", "${"])
def test_interpolations_that_fail_are_reported(value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"interpolation|cannot be read"):
        load_config(["recipe=demo", f"data.train={value}"])


def test_a_section_can_be_given_as_a_mapping() -> None:
    assert load_config(["recipe=demo", "optimizer={beta1: 0.8}"]).optimizer.beta1 == 0.8


# Directories of users


@pytest.mark.parametrize("directory_name", ["mine", "with space, it's = odd"])
def test_users_recipes(tmp_path: Path, directory_name: str) -> None:
    directory = tmp_path / directory_name
    write(directory, "model/tiny.yaml", "vocab_size: 128\nnum_layers: 2\nhidden_size: 64\nnum_attention_heads: 2\nffn_hidden_size: 96\n")
    body = "defaults:\n  - demo\n  - override /model: tiny\n  - _self_\nname: mine\ntraining:\n  seed: 5\n"
    write(directory, "recipe/mine.yaml", HEADER + body)
    config = load_config(["recipe=mine", "training.micro_batch_size=4"], [str(directory)])
    assert (config.name, config.model.num_layers, config.training.seed) == ("mine", 2, 5)
    assert config.training.global_batch_size == load_config(["recipe=demo"]).training.global_batch_size
    assert load_config(["recipe=demo", "model=tiny"], [str(directory)]).model.vocab_size == 128


def test_several_directories(tmp_path: Path) -> None:
    write(tmp_path / "a", "data/one.yaml", "train: a\ntokenizer: b\nsequence_length: 128\n")
    write(tmp_path / "b", "recipe/two.yaml", HEADER + "defaults:\n  - demo\n  - override /data: one\n  - _self_\nname: two\n")
    config = load_config(["recipe=two"], [str(tmp_path / "a"), str(tmp_path / "b")])
    assert (config.name, config.data.train) == ("two", "a")


def test_relative_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "recipe/mine.yaml", HEADER + "defaults:\n  - demo\n  - _self_\nname: mine\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(["recipe=mine"], ["."]).name == "mine"


def test_unknown_keys_in_recipe_files_are_reported(tmp_path: Path) -> None:
    body = "defaults:\n  - demo\n  - _self_\nmodel:\n  hiden_size: 3\noptm:\n  lr: 1\ntraining:\n  seed: x\n"
    write(tmp_path, "recipe/mine.yaml", HEADER + body)
    problems = problems_of("recipe=mine", "name=1", config_dirs=(str(tmp_path),))
    assert set(problems) == {"model.hiden_size", "optm.lr", "training.seed", "name"}


def test_wrong_files_are_reported(tmp_path: Path) -> None:
    shadowed = write(tmp_path, "model/w1_4b.yaml", "vocab_size: 5\n")
    misnamed = write(tmp_path, "recipe/other.yml", HEADER)
    write(tmp_path, "recipe/local.yaml", "# What it is\n# @package _global_\nname: x\n")
    write(tmp_path, "unrelated/workflow.yml", "a: 1\n")
    missing = str(tmp_path / "nowhere")
    problems = problems_of("recipe=local", "seed=1", config_dirs=(str(tmp_path), missing))
    assert set(problems) == {str(shadowed), str(misnamed), "recipe/local.yaml", "seed", f"--config-dir {missing}"}
    assert "my_w1_4b.yaml" in (problems[str(shadowed)].suggestion or "")
    assert "other.yaml" in (problems[str(misnamed)].suggestion or "")
    assert HEADER.strip() in problems["recipe/local.yaml"].valid


@pytest.mark.parametrize(
    ("body", "key", "words"),
    [
        ("defaults:\n  - demo\n  - override /model: w1_4c\n  - _self_\n", "model", "w1_4c"),
        ("defaults:\n  - demoo\n", "recipe", "demoo"),
        ("defaults:\n  - override /modle: small\n", "the recipe files", "modle"),
        ("defaults: 5\n", "the recipe files", "must be a list"),
        ("defaults:\n  - mine\n", "the recipe files", "includes itself"),
        ("- a\n", "the recipe files", "recipe/mine"),
        ("name: [x\n", "the recipe files", "mine.yaml"),
        ("name: a\nname: b\n", "the recipe files", "name"),
    ],
)
def test_recipe_files_that_hydra_cannot_compose(tmp_path: Path, body: str, key: str, words: str) -> None:
    write(tmp_path, "recipe/mine.yaml", HEADER + body)
    problems = problems_of("recipe=mine", "training.seed=x", config_dirs=(str(tmp_path),))
    assert set(problems) == {key, "training.seed"}
    assert words in problems[key].found


def test_keys_marked_missing_are_missing(tmp_path: Path) -> None:
    write(tmp_path, "data/mine.yaml", "train: ???\ntokenizer: tokenizer.json\nsequence_length: 256\n")
    assert set(problems_of("recipe=demo", "data=mine", config_dirs=(str(tmp_path),))) == {"data.train"}
    assert load_config(["recipe=demo", "data=mine", "data.train=x"], [str(tmp_path)]).data.train == "x"


# Side effects


def test_hydra_is_left_as_it_was(tmp_path: Path) -> None:
    load_config(["recipe=demo"])
    assert not GlobalHydra.instance().is_initialized()
    write(tmp_path, "own.yaml", "a: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        load_config(["recipe=demo"])
        assert compose("own") == {"a": 1}


def test_many_processes_compose_at_once_and_write_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from w1train.config.compose import load_config; from w1train.config.serialization import config_to_yaml;"
        "print(config_to_yaml(load_config(['recipe=w1_4b', 'parallel.tensor=4'])));"
        "assert not {'torch', 'megatron', 'wandb'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(set(outputs)) == 1
    assert flatten(config_from_yaml(outputs[0]))["parallel.tensor"] == 4
    assert list(tmp_path.iterdir()) == []


def test_a_directory_named_recipes_beside_the_command(tmp_path: Path) -> None:
    """Python takes such a directory for the package recipes if it has an __init__.py, or if w1train is installed from a checkout."""
    write(tmp_path / "recipes", "recipe/mine.yaml", "# @package _global_\ndefaults: [demo]\nname: mine\n")
    (tmp_path / "recipes/__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(packaged_directory().parent)}
    command = [sys.executable, "-m", "w1train.pretrain", "--config-dir", "recipes", "recipe=mine", "--cfg", "job"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert config_from_yaml(result.stdout).name == "mine"


def test_every_recipe_file_is_plain_yaml() -> None:
    for path in packaged_directory().rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert isinstance(yaml.safe_load(text), dict)
        assert "_target_" not in text
