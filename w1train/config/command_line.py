"""The command line of programs that take a configuration: recipes, overrides and a few flags, in any order."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
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
    counts: dict[str, int] = field(default_factory=dict)
    """The values of the program's own flags that were given."""


@dataclass(slots=True)
class _Words:
    """The arguments by kind, not interpreted yet."""

    overrides: list[str] = field(default_factory=list)
    config_dirs: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse_command_line(
    argv: Sequence[str],
    rules: Sequence[Rule] = (),
    counts: Mapping[str, str] | None = None,
    run_rules: Callable[[Mapping[str, int]], Sequence[Rule]] | None = None,
) -> CommandLine:
    """Read a command line (without the program's name).

    Args:
        rules: what the caller checks beside the rules of the configuration.
        counts: the flags that only this program has, with their meanings. Their values are whole numbers > 0.
        run_rules: takes the values of these flags, and returns what the caller checks too if the configuration shall run, and not only be
            printed.

    Raises:
        ConfigurationError: with the problems of the flags and of the configuration.
    """
    words = _split(argv, counts or {})
    if "--help" in words.flags:
        return CommandLine("help", None, words.config_dirs)
    if "--list" in words.flags:
        raise_if_any(words.problems)
        return CommandLine("list", None, words.config_dirs)
    # The import of Hydra takes a third of a second, and --help and --list do not need it.
    from w1train.config.compose import load_config

    try:
        more_rules = () if run_rules is None or "--cfg" in words.flags else run_rules(words.counts)
        config = load_config(words.overrides, words.config_dirs, [*rules, *more_rules])
    except ConfigurationError as error:
        raise ConfigurationError(words.problems + error.problems) from error
    raise_if_any(words.problems)
    return CommandLine("print_config" if "--cfg" in words.flags else "run", config, words.config_dirs, words.counts)


def config_from_command_line(
    argv: Sequence[str],
    program: str,
    description: str,
    rules: Sequence[Rule] = (),
    counts: Mapping[str, str] | None = None,
    run_rules: Callable[[Mapping[str, int]], Sequence[Rule]] | None = None,
) -> tuple[Config, dict[str, int]]:
    """Return the configuration that a program shall run, and the values of the program's own flags that were given. The arguments are those
    of ``parse_command_line``.

    The function does not return for --cfg, --list and --help (exit status 0) or for mistakes (exit status 2, text on stderr).
    """
    try:
        command_line = parse_command_line(argv, rules, counts, run_rules)
    except ConfigurationError as error:
        _exit_with(f"{program}: {error}\n\n'{program} --help' explains the command line.", _USAGE_ERROR)
    if command_line.action == "help":
        _exit_with(_help_text(program, description, command_line.config_dirs, counts or {}), 0)
    if command_line.action == "list":
        _exit_with(_recipe_list(command_line.config_dirs), 0)
    assert command_line.config is not None
    if command_line.action == "print_config":
        _exit_with(config_to_yaml(command_line.config).rstrip("\n"), 0)
    return command_line.config, command_line.counts


def without_flag(argv: Sequence[str], flag: str) -> list[str]:
    """Return the command line without a flag and its value."""
    words: list[str] = []
    remaining = list(argv)
    while remaining:
        word = remaining.pop(0)
        if word == flag:
            remaining = remaining[1:]
        elif not word.startswith(f"{flag}="):
            words.append(word)
    return words


def _split(argv: Sequence[str], counts: Mapping[str, str]) -> _Words:
    known = {**{flag: value for flag, (value, _) in _FLAGS.items()}, **dict.fromkeys(counts, "N")}
    words = _Words()
    remaining = list(argv)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("-"):
            words.overrides.append(word)
            continue
        flag, has_value, value = word.partition("=")
        flag = {"-h": "--help"}.get(flag, flag)
        if flag not in known:
            words.problems.append(_unknown_flag(flag, word, known))
            continue
        if known[flag] and not has_value:
            value = remaining.pop(0) if remaining else ""
        words.flags.add(flag)
        if flag in counts:
            _add_count(words, flag, value)
        if flag == "--config-dir" and value:
            words.config_dirs.append(value)
        elif flag == "--config-dir":
            words.problems.append(Problem(flag, "nothing", "the path of a directory", "--config-dir DIR"))
        if flag == "--cfg" and value != "job":
            words.problems.append(Problem("--cfg", value or "nothing", "job", "--cfg job"))
        if not known[flag] and has_value:
            words.problems.append(Problem(flag, f"the value {value!r}", "no value", flag))
    return words


def _add_count(words: _Words, flag: str, value: str) -> None:
    if value.isascii() and value.isdecimal() and len(value) < 19 and int(value) > 0:
        words.counts[flag] = int(value)
    else:
        words.problems.append(Problem(flag, value or "nothing", "a whole number > 0", f"{flag} 2"))


def _unknown_flag(flag: str, word: str, known: Collection[str]) -> Problem:
    match = closest(flag, known)
    name, _, value = word.lstrip("-").partition("=")
    otherwise = f"did you mean {match}?" if match else f"without dashes if it is a key: {word.lstrip('-')}"
    return Problem(word, "an unknown flag", listing(known), hint_for(name, value or None) or otherwise)


def _help_text(program: str, description: str, config_dirs: Sequence[str], counts: Mapping[str, str]) -> str:
    known = {**{flag: ("N", meaning) for flag, meaning in counts.items()}, **_FLAGS}
    flags = [f"  {f'{flag} {value}':18}{meaning}" for flag, (value, meaning) in known.items()]
    options = groups(_directories(config_dirs))
    choices = [f"  {group:18}{listing(names)}" for group, names in options.items() if group != RECIPE_GROUP]
    return "\n".join(
        [
            description,
            "",
            f"usage: {program} recipe=NAME [GROUP=OPTION ...] [KEY=VALUE ...] [~KEY ...] [flags, anywhere]",
            "",
            "examples:",
            f"  {program} recipe=demo",
            f"  {program} recipe=w1_4b parallel.tensor=4 --cfg job",
            f"  {program} --config-dir my_recipes recipe=mine model=w1_4b name=second",
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
