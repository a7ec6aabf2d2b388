"""The parser of options: no abbreviations, and hints for what is unknown."""

from __future__ import annotations

import re

import pytest

from tests.test_project import python_files
from w1train.config.argument_parser import ArgumentParser, number_in
from w1train.config.constraints import Range


def parser() -> ArgumentParser:
    made = ArgumentParser(prog="w1train thing")
    made.add_argument("run")
    made.add_argument("--steps", type=int)
    made.add_checkpoint_option()
    return made


def complaint(capsys: pytest.CaptureFixture[str], made: ArgumentParser, *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        made.parse_args(words)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("words", [["--step", "100"], ["--step=100"]])
def test_step_is_not_steps(capsys, words):
    text = complaint(capsys, parser(), "runs/demo", *words)
    assert "--step: --checkpoint STEP chooses a checkpoint; --steps N is the number of denoising steps" in text


def test_options_of_a_verb_are_hinted_too(capsys):
    made = ArgumentParser(prog="w1train things")
    verb = made.add_subparsers(dest="verb").add_parser("export")
    verb.add_checkpoint_option()
    assert "--step: --checkpoint STEP chooses a checkpoint\n" in complaint(capsys, made, "export", "--step", "3")
    assert "--chekpoint: did you mean --checkpoint?" in complaint(capsys, made, "export", "--chekpoint", "3")
    assert "unrecognized arguments: --check" in complaint(capsys, made, "export", "--check", "3"), "an abbreviation"


@pytest.mark.parametrize(("text", "value"), [("900", 900), ("average", "average"), ("average_0000000900_0a", "average_0000000900_0a")])
def test_the_checkpoint(text, value):
    assert parser().parse_args(["run", "--checkpoint", text]).checkpoint == value
    assert parser().parse_args(["run"]).checkpoint is None


def test_no_parser_takes_abbreviations():
    """argparse's own takes them by default."""
    made = re.compile(r"argparse[.]ArgumentParser\(|from[ ]argparse[ ]import")
    assert [str(path) for path in python_files() if made.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("kind", "valid", "text", "expected"),
    [
        (int, Range(2), "2", 2),
        (float, Range(0, 1), "0.5", 0.5),
        (int, Range(2), "1", "found: 1; valid: a number >= 2"),
        (int, Range(2), "2.5", "found: '2.5'; valid: a whole number >= 2"),
        (int, Range(2), "9" * 5000, "valid: a whole number >= 2"),
        (float, Range(0, 1), "inf", "found: inf; valid: a finite number >= 0 and <= 1"),
    ],
)
def test_numbers_are_within_their_range(capsys, kind, valid, text, expected):
    made = ArgumentParser(prog="w1train thing")
    made.add_argument("--number", type=number_in(kind, valid))
    if isinstance(expected, str):
        assert expected in complaint(capsys, made, f"--number={text}")
    else:
        assert made.parse_args(["--number", text]).number == expected
