"""The command line of w1train.plan: options of its own, and a recipe with overrides as in every other command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from w1train.config.argument_parser import ArgumentParser
from w1train.config.command_line import config_from_command_line, parse_command_line
from w1train.config.errors import ConfigurationError, Problem, closest, listing
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config
from w1train.planning.assumptions import DEVICES, Assumptions, Device, replace_assumptions

PROGRAM = "w1train plan"
DESCRIPTION = """Plan a run before a GPU is booked: memory, traffic, speed, and whether the layout can be built.

  gpus=N               devices of the run; also --gpus N
  --device NAME        h100 (default), h800 or h200
  --documents TOKENS   length of the documents packed into a sample (default: one document fills a sample)
  --assume NAME=VALUE  replace an assumption, for example matmul_efficiency=0.75; may be repeated
  --search             rank the layouts that fit by predicted MFU, instead of planning the given one
  --json               print one JSON object for programs

Exit status: 0; 1 if the layout does not fit or cannot be built; 2 for a mistake in the command line."""


@dataclass(frozen=True, slots=True)
class Request:
    """The run to plan, and how."""

    config: Config
    num_gpus: int
    device: Device
    assumptions: Assumptions
    document_length: int | None
    search: bool
    json: bool


def parse(arguments: Sequence[str], rules: Sequence[Rule] = ()) -> Request:
    """Read a command line. The function does not return for --help, --list and --cfg.

    Args:
        rules: what the caller checks beside the rules of the configuration.

    Raises:
        ConfigurationError: every problem of the flags, the recipe and the overrides.
    """
    known, rest = _parser().parse_known_args(list(arguments))
    asked_for_text = any(word in ("-h", "--help", "--list") for word in rest)
    given = [word.removeprefix("gpus=") for word in rest if word.startswith("gpus=")] + known.gpus
    rest = [word for word in rest if not word.startswith("gpus=")]
    problems: list[Problem] = []
    num_gpus = _count("gpus", given[-1] if given else None, problems)
    documents = _count("--documents", known.documents, problems) if known.documents is not None else None
    assumptions, wrong = replace_assumptions(Assumptions(), known.assume)
    problems += wrong
    if known.device not in DEVICES:
        match = closest(known.device, DEVICES)
        problems.append(Problem("--device", known.device, listing(DEVICES), f"did you mean {match}?" if match else None))
    if problems and not asked_for_text:
        raise ConfigurationError(problems + _problems_of(rest, rules))
    config, _ = config_from_command_line(rest, PROGRAM, DESCRIPTION, rules)
    return Request(config, num_gpus, DEVICES[known.device], assumptions, documents, known.search, known.json)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog=PROGRAM, add_help=False)
    parser.add_argument("--gpus", action="append", default=[])
    parser.add_argument("--device", default="h100")
    parser.add_argument("--documents")
    parser.add_argument("--assume", action="append", default=[])
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser


def _count(key: str, text: str | None, problems: list[Problem]) -> int:
    if text is not None and text.isdecimal() and int(text) > 0:
        return int(text)
    problems.append(Problem(key, text or "(not given)", "a whole number > 0", "gpus=512" if key == "gpus" else None))
    return 0


def _problems_of(words: Sequence[str], rules: Sequence[Rule]) -> list[Problem]:
    """Return the problems of the recipe and the overrides, which are reported together with those of the options."""
    try:
        parse_command_line(words, rules)
    except ConfigurationError as error:
        return error.problems
    return []
