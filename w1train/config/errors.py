"""What is wrong with a configuration, the one exception that carries all of it, and the base of all errors of users."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import yaml

from w1train.config.credentials import mask_tree, mask_urls

NOT_GIVEN = "(not given)"
MOST_PROBLEMS = 50
"""The most problems of one configuration that are shown: a file that is no configuration at all has a problem at each of its keys."""
_LONGEST_VALUE = 80
_LONGEST_KEY = 200


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: the key to change, what was found there and what would be valid."""

    key: str
    """Full key in the tree, for example ``model.hidden_size``; or the flag, file or override that is wrong."""
    found: str
    """The value found, as text."""
    valid: str
    """What would be valid."""
    suggestion: str | None = None
    """What the user most probably wants."""

    def __str__(self) -> str:
        lines = [_on_one_line(self.key), f"   found: {self.found}", f"   valid: {self.valid}"]
        if self.suggestion:
            lines.append(f"   try:   {self.suggestion}")
        return mask_urls("\n".join(lines))


class UserError(ValueError):
    """A mistake in what the user gave. Commands show its text alone; any other error is one of the program and keeps its traceback.
    The text has no passwords of URLs."""

    def __str__(self) -> str:
        return mask_urls(super().__str__())


class ConfigurationError(UserError):
    """A configuration that cannot be used; the text lists the problems, numbered: all of them up to MOST_PROBLEMS."""

    def __init__(self, problems: Sequence[Problem], origin: str | None = None):
        """``origin`` is the file that the configuration comes from, if it is one file."""
        assert problems, "a ConfigurationError needs a problem"
        self.problems, self.origin = list(problems), origin
        count = len(self.problems)
        title = f"{count} problem{'s' if count > 1 else ''} in the configuration{f' {origin}' if origin else ''}:"
        shown = [f"{number}. {problem}" for number, problem in enumerate(self.problems[:MOST_PROBLEMS], 1)]
        super().__init__("\n".join([title, *shown, *([f"... and {count - MOST_PROBLEMS} more"] if count > MOST_PROBLEMS else [])]))

    def __reduce__(self) -> tuple[type[ConfigurationError], tuple[list[Problem], str | None]]:
        """Rank 0 sends it to the others, whose copy would otherwise take the text for the problems."""
        return ConfigurationError, (self.problems, self.origin)


def _on_one_line(key: str) -> str:
    """A key as it is, unless it is a text that would fill the screen or steer the terminal."""
    return key if len(key) <= _LONGEST_KEY and key.isprintable() else ascii(key[:_LONGEST_KEY])


def raise_if_any(problems: Sequence[Problem]) -> None:
    """Raise a ConfigurationError with all problems, if there are any."""
    if problems:
        raise ConfigurationError(problems)


def show(value: object) -> str:
    """A value as it would be written in YAML, on one line and shortened, without passwords of URLs."""
    value = mask_tree(value)  # before it is shortened: what is left of a URL may end in the middle of its password
    if isinstance(value, str):
        text = repr(value)
    else:
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**9, allow_unicode=True)
        text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def listing(names: Iterable[object]) -> str:
    """Names separated by commas."""
    return ", ".join(str(name) for name in names)


def closest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that ``name`` was probably meant to be, if any is near."""
    by_lower_case = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return by_lower_case[matches[0]] if matches else None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
