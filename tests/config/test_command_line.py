"""The command line: flags and overrides in any order, output and exit status."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from w1train import pretrain
from w1train.config.command_line import config_from_command_line, parse_command_line, without_flag
from w1train.config.compose import load_config
from w1train.config.errors import ConfigurationError
from w1train.config.recipe_files import packaged_directory
from w1train.config.schema import Config
from w1train.config.serialization import config_from_yaml


@pytest.fixture
def user_directory(tmp_path: Path) -> str:
    (tmp_path / "recipe").mkdir()
    text = "# @package _global_\n# My own run.\ndefaults:\n  - demo\n  - _self_\nname: mine\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(text, encoding="utf-8")
    return str(tmp_path)


def run(*argv: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        config_from_command_line(argv, program="w1train train", description="Pretrain a model.", counts={"--max-steps": "for trials"})
    return caught.value.code


def test_flags_and_overrides_in_any_order(user_directory: str) -> None:
    expected = load_config(["recipe=mine", "training.seed=9"], [user_directory])
    parts = [["recipe=mine"], ["--config-dir", user_directory, "training.seed=9"], ["--cfg", "job"]]
    for order in itertools.permutations(parts):
        command_line = parse_command_line([word for part in order for word in part])
        assert (command_line.action, command_line.config) == ("print_config", expected)
    assert parse_command_line([f"--config-dir={user_directory}", "recipe=mine", "--cfg=job", "training.seed=9"]).config == expected


def test_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    config, counts = config_from_command_line(["recipe=demo"], program="p", description="d")
    assert (config, counts) == (load_config(["recipe=demo"]), {})
    assert capsys.readouterr() == ("", "")


def test_the_printed_configuration_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipe=w1_4b", "parallel.tensor=4", "--cfg", "job") == 0
    output = capsys.readouterr()
    assert config_from_yaml(output.out) == load_config(["recipe=w1_4b", "parallel.tensor=4"])
    assert output.err == ""


def test_list_names_recipes_and_says_what_they_are(capsys: pytest.CaptureFixture[str], user_directory: str) -> None:
    assert run("--list", "--config-dir", user_directory) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    packaged = [path.stem for path in (packaged_directory() / "recipe").glob("*.yaml")]
    assert [name for name, _ in lines] == sorted([*packaged, "mine"])
    assert dict(lines)["mine"] == "My own run."  # type: ignore[arg-type]
    assert dict(lines)["llada_8b"].startswith("LLaDA 8B")  # type: ignore[arg-type]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert run(flag, "model=nonsense") == 0
    text = capsys.readouterr().out
    for words in (
        "Pretrain a model.",
        "usage: w1train train",
        "--config-dir DIR",
        "--max-steps N     for trials",
        "w1_4b",
        "parallel",
        "docs/configuration.md",
    ):
        assert words in text


def test_mistakes_go_to_stderr_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipe=demo", "--cgf", "model.hiden_size=1", "training.seed=x", "--parallel.tensor=2") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("w1train train: 4 problems in the configuration:\n1. --cgf\n")
    for words in (
        "did you mean --cfg?",
        "without dashes if it is a key: parallel.tensor=2",
        "did you mean model.hidden_size?",
        "training.seed",
    ):
        assert words in output.err
    assert "Traceback" not in output.err


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--cfg"], "--cfg"),
        (["--cfg", "yaml"], "--cfg"),
        (["--config-dir"], "--config-dir"),
        (["--cfgg", "recipe=demo"], "--cfgg"),
        (["-m"], "-m"),
        (["--"], "--"),
    ],
)
def test_wrong_flags(words: list[str], key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_command_line(["recipe=demo", *words])
    assert [problem.key for problem in caught.value.problems] == [key]


@pytest.mark.parametrize("words", [["--max-steps", "7"], ["--max-steps=7"]])
def test_a_flag_of_one_program(words: list[str]) -> None:
    counts = {"--max-steps": "for trials"}
    assert parse_command_line([words[0], *words[1:], "recipe=demo"], counts=counts).counts == {"--max-steps": 7}
    assert without_flag(["recipe=demo", *words, "--cfg", "job"], "--max-steps") == ["recipe=demo", "--cfg", "job"]
    with pytest.raises(ConfigurationError, match="an unknown flag"):
        parse_command_line([*words, "recipe=demo"])


def test_flags_without_a_value_take_none() -> None:
    with pytest.raises(ConfigurationError, match="no value"):
        parse_command_line(["--list=all"])


def test_one_rank_of_a_node_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for local_rank in (3, 0):
        monkeypatch.setenv("RANK", str(8 + local_rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert run("recipe=demo", "model.hiden_size=1") == 2
        assert ("did you mean model.hidden_size?" in capsys.readouterr().err) == (local_rank == 0)


@pytest.mark.parametrize(("rank", "launcher", "waits"), [("0", "torchrun", False), ("1", "torchrun", True), ("1", None, False)])
def test_under_torchrun_other_ranks_let_the_first_one_speak(
    monkeypatch: pytest.MonkeyPatch, rank: str, launcher: str | None, waits: bool
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launcher)
    with pytest.raises(SystemExit) as caught:
        config_from_command_line(["recipe=nonsense"], program="w1train.pretrain", description="")
    assert caught.value.code == 2
    assert bool(slept) == waits


def test_after_ctrl_c_they_do_not_keep_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchrun that has been interrupted as well waits for all ranks."""

    def interrupted(_config: Config, _max_steps: int | None) -> int:
        raise KeyboardInterrupt

    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(pretrain, "run", interrupted)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "torchrun"}.items():
        monkeypatch.setenv(name, value)
    assert pretrain.main(["recipe=demo"]) == 130
    assert sum(slept) <= 2
