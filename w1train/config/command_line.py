"""The command line of programs that take a configuration: recipes, overrides and a few flags, in any order."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

from w1train.config.errors import ConfigurationError, Problem, closest, listing, raise_if_any
from w1train.config.recipe_files import RECIPE_GROUP, check_user_directories, first_comment, groups, packaged_directory
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config
from w1train.config.serialization import config_to_yaml
from w1train.config.synonyms import hint_for

Action = Literal["run", "print_config", "list", "help"]
_FLAGS = {
    "--cfg": ("job", "print the resolved configuration, every default included, and exit"),
    "--config-dir": ("DIR", "a directory with your own recipes (DIR/recipe/NAME.yaml, DIR/model/NAME.yaml, ...); may be repeated"),
    "--list": ("", "list the recipes and exit"),
    "--help": ("", "show this text and exit"),
}
_USAGE_ERROR = 2
PATIENCE_SECONDS = 20.0


@dataclass(slots=True)
class CommandLine:
    """The request of a command line."""

    action: Action
    config: Config | None
    """The configuration, if the action is ``run`` or ``print_config``; None for the other actions."""
    config_dirs: list[str]


@dataclass(slots=True)
class _Words:
    """The arguments by kind, not interpreted yet."""

    overrides: list[str] = field(default_factory=list)
    config_dirs: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


def parse_command_line(argv: Sequence[str], rules: Sequence[Rule] = (), run_rules: Sequence[Rule] = ()) -> CommandLine:
    """Read a command line (without the program's name).

    Args:
        rules: what the caller checks beside the rules of the configuration.
        run_rules: what the caller checks too if the configuration shall run, and not only be printed.

    Raises:
        ConfigurationError: with the problems of the flags and of the configuration.
    """
    words = _split(argv)
    if "--help" in words.flags:
        return CommandLine("help", None, words.config_dirs)
    if "--list" in words.flags:
        raise_if_any(words.problems)
        return CommandLine("list", None, words.config_dirs)
    # The import of Hydra takes a third of a second, and --help and --list do not need it.
    from w1train.config.compose import load_config

    try:
        config = load_config(words.overrides, words.config_dirs, rules if "--cfg" in words.flags else [*rules, *run_rules])
    except ConfigurationError as error:
        raise ConfigurationError(words.problems + error.problems) from error
    raise_if_any(words.problems)
    return CommandLine("print_config" if "--cfg" in words.flags else "run", config, words.config_dirs)


def config_from_command_line(
    argv: Sequence[str], program: str, description: str, rules: Sequence[Rule] = (), run_rules: Sequence[Rule] = ()
) -> Config:
    """Return the configuration that a program shall run.

    The function does not return for --cfg, --list and --help (exit status 0) or for mistakes (exit status 2, text on stderr).
    """
    try:
        command_line = parse_command_line(argv, rules, run_rules)
    except ConfigurationError as error:
        _exit_with(f"{program}: {error}\n\n'python -m {program} --help' explains the command line.", _USAGE_ERROR)
    if command_line.action == "help":
        _exit_with(_help_text(program, description, command_line.config_dirs), 0)
    if command_line.action == "list":
        _exit_with(_recipe_list(command_line.config_dirs), 0)
    assert command_line.config is not None
    if command_line.action == "print_config":
        _exit_with(config_to_yaml(command_line.config).rstrip("\n"), 0)
    return command_line.config


def _split(argv: Sequence[str]) -> _Words:
    words = _Words()
    remaining = list(argv)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("-"):
            words.overrides.append(word)
            continue
        flag, has_value, value = word.partition("=")
        flag = {"-h": "--help"}.get(flag, flag)
        if flag not in _FLAGS:
            words.problems.append(_unknown_flag(flag, word))
            continue
        if _FLAGS[flag][0] and not has_value:
            value = remaining.pop(0) if remaining else ""
        words.flags.add(flag)
        if flag == "--config-dir" and value:
            words.config_dirs.append(value)
        elif flag == "--config-dir":
            words.problems.append(Problem(flag, "nothing", "the path of a directory", "--config-dir DIR"))
        if flag == "--cfg" and value != "job":
            words.problems.append(Problem("--cfg", value or "nothing", "job", "--cfg job"))
        if not _FLAGS[flag][0] and has_value:
            words.problems.append(Problem(flag, f"the value {value!r}", "no value", flag))
    return words


def _unknown_flag(flag: str, word: str) -> Problem:
    match = closest(flag, _FLAGS)
    name, _, value = word.lstrip("-").partition("=")
    otherwise = f"did you mean {match}?" if match else f"without dashes if it is a key: {word.lstrip('-')}"
    suggestion = hint_for(name, value or None) or otherwise
    return Problem(word, "an unknown flag", listing(_FLAGS), suggestion)


def _help_text(program: str, description: str, config_dirs: Sequence[str]) -> str:
    flags = [f"  {f'{flag} {value}':18}{meaning}" for flag, (value, meaning) in _FLAGS.items()]
    options = groups(_directories(config_dirs))
    choices = [f"  {group:18}{listing(names)}" for group, names in options.items() if group != RECIPE_GROUP]
    return "\n".join(
        [
            description,
            "",
            f"usage: python -m {program} recipe=NAME [GROUP=OPTION ...] [KEY=VALUE ...] [~KEY ...] [flags, anywhere]",
            "",
            "examples:",
            f"  python -m {program} recipe=demo",
            f"  python -m {program} recipe=w1_4b parallel.tensor=4 --cfg job",
            f"  python -m {program} --config-dir my_recipes recipe=mine model=w1_4b name=second",
            "",
            "flags:",
            *flags,
            "",
            "recipes (complete runs):",
            _recipe_list(config_dirs),
            "",
            "groups (parts of a run):",
            *choices,
            "",
            "Every KEY, its type, default and meaning: docs/configuration.md or python -m w1train.config.schema_reference",
        ]
    )


def _recipe_list(config_dirs: Sequence[str]) -> str:
    directories = _directories(config_dirs)
    names = groups(directories)[RECIPE_GROUP]
    width = max(map(len, names)) + 2
    return "\n".join(f"  {name:{max(width, 18)}}{first_comment(directories, RECIPE_GROUP, name)}" for name in names)


def _directories(config_dirs: Sequence[str]) -> list[Path]:
    """Return the packaged and the user's directories. Mistakes in a user's directory are reported when a recipe is used, not by --list."""
    return [packaged_directory(), *check_user_directories(config_dirs)[0]]


def _exit_with(text: str, status: int) -> NoReturn:
    # Every rank of a torchrun has the same text here, unless a node has other files. Therefore one rank of each node prints it.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr if status else sys.stdout, flush=True)
    if status:
        wait_for_main_rank()
    raise SystemExit(status)


def wait_for_main_rank(seconds: float = PATIENCE_SECONDS) -> None:
    """Wait before a failure that rank 0 reports, on every other rank under torchrun.

    torchrun ends all ranks as soon as one has failed, and would end rank 0 before its report if another rank were faster. torchrun also
    ends this wait, unless it has been interrupted itself: it then waits for all ranks.
    """
    if os.environ.get("RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(seconds)
