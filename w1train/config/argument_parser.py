"""The parser of the options of all commands that take no recipe. It accepts no abbreviations, and tells what an unknown option may mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from w1train.config.constraints import Range
from w1train.config.errors import closest

CHECKPOINT_HELP = "the checkpoint: its step, its name, or average for the newest average (default: the newest step)"


class ArgumentParser(argparse.ArgumentParser):
    """A parser that refuses abbreviated options.

    With abbreviations, which are argparse's default, ``--step 100`` would mean ``--steps 100``: the number of denoising steps in the place
    of a checkpoint. An abbreviation would also change its meaning when a command gets another option.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self.hints: dict[str, str] = {}
        """The hint for each option that this parser does not have: what to use in its place."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the arguments. Exit with 2 for unknown arguments, and tell what they may mean."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error("\n".join([f"unrecognized arguments: {' '.join(unknown)}", *self._suggestions(unknown)]))
        return known

    def add_checkpoint_option(self) -> None:
        """Add --checkpoint, which has the same meaning in every command that reads a checkpoint."""
        self.add_argument("--checkpoint", type=checkpoint_name, metavar="STEP|average|NAME", help=CHECKPOINT_HELP)
        steps = "; --steps N is the number of denoising steps" if "--steps" in self._option_string_actions else ""
        self.hints["--step"] = f"--checkpoint STEP chooses a checkpoint{steps}"

    def _suggestions(self, unknown: Sequence[str]) -> Iterator[str]:
        parsers = [self, *self._parsers_of_verbs()]
        hints = {option: hint for parser in parsers for option, hint in parser.hints.items()}
        options = [option for parser in parsers for option in parser._option_string_actions if option.startswith("--")]
        for word in unknown:
            name = word.partition("=")[0]
            if name in hints:
                yield f"{name}: {hints[name]}"
            elif name.startswith("--") and (match := closest(name, options)) is not None:
                yield f"{name}: did you mean {match}?"

    def _parsers_of_verbs(self) -> Iterator[ArgumentParser]:
        if self._subparsers is not None:
            for action in self._subparsers._group_actions:
                yield from action.choices.values()  # type: ignore[union-attr]


def number_in[Number: (int, float)](kind: type[Number], valid: Range) -> Callable[[str], Number]:
    """Return the type of an argument that is a number within a range, so that a wrong number is refused before anything is loaded."""

    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"found: {text!r}; valid: {'a whole number' if kind is int else 'a number'} {valid}") from None
        if value not in valid:
            raise argparse.ArgumentTypeError(f"found: {text}; valid: {valid.words(value)}")
        return value

    return read


def checkpoint_name(text: str) -> int | str:
    """Return a step as a number, and any other text as it is. This is the type of an argument."""
    return int(text) if text.isdecimal() else text
