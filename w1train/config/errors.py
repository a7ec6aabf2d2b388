"""Problems of a configuration, the exception that carries all of them, and the base class of all errors of users."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from w1train.config.credentials import mask_tree, mask_urls

NOT_GIVEN = "(not given)"
MOST_PROBLEMS = 50
"""Most problems of one configuration that are shown. A file that is not a configuration has a problem at each of its keys."""
_LONGEST_VALUE = 80
_LONGEST_KEY = 200


@dataclass(frozen=True, slots=True)
class Problem:
    """A mistake: the key to change, the value found there and what would be valid."""

    key: str
    """Full key in the tree, for example ``model.hidden_size``; or the flag, file or override that is wrong."""
    found: str
    """The value found, as text."""
    valid: str
    """What would be valid."""
    suggestion: str | None = None
    """What the user probably meant."""

    def __str__(self) -> str:
        lines = [_on_one_line(self.key), f"   found: {self.found}", f"   valid: {self.valid}"]
        if self.suggestion:
            lines.append(f"   try:   {self.suggestion}")
        return mask_urls("\n".join(lines))


class UserError(ValueError):
    """A mistake in what the user gave. Commands show only its text; every other error is a fault of the program and keeps its traceback.
    The text does not contain passwords of URLs."""

    def __str__(self) -> str:
        return mask_urls(super().__str__())


class ConfigurationError(UserError):
    """A configuration that cannot be used. The text is a numbered list of the first MOST_PROBLEMS problems."""

    def __init__(self, problems: Sequence[Problem], origin: str | None = None):
        """Keep the problems and make the text.

        Args:
            origin: the file that the configuration comes from, if it comes from a single file.
        """
        assert problems, "a ConfigurationError needs a problem"
        self.problems, self.origin = list(problems), origin
        count = len(self.problems)
        title = f"{count} problem{'s' if count > 1 else ''} in the configuration{f' {origin}' if origin else ''}:"
        shown = [f"{number}. {problem}" for number, problem in enumerate(self.problems[:MOST_PROBLEMS], 1)]
        super().__init__("\n".join([title, *shown, *([f"... and {count - MOST_PROBLEMS} more"] if count > MOST_PROBLEMS else [])]))

    def __reduce__(self) -> tuple[type[ConfigurationError], tuple[list[Problem], str | None]]:
        """Keep the problems when the error is pickled. Rank 0 sends the error to other ranks. Without this method, they would
        rebuild the error with its text in the place of the list of problems."""
        return ConfigurationError, (self.problems, self.origin)


def _on_one_line(key: str) -> str:
    """Return the key. A key that is very long is shortened, and control characters are escaped."""
    return key if len(key) <= _LONGEST_KEY and key.isprintable() else ascii(key[:_LONGEST_KEY])


def raise_if_any(problems: Sequence[Problem]) -> None:
    """Raise a ConfigurationError with all problems if there are any."""
    if problems:
        raise ConfigurationError(problems)


def show(value: object) -> str:
    """Return a value as YAML on one line, shortened and without passwords of URLs."""
    # Passwords are masked first: a URL that is shortened in the middle of its password would not be recognized.
    value = mask_tree(value)
    if isinstance(value, str):
        text = repr(value)
    else:
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**9, allow_unicode=True)
        text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def listing(names: Iterable[object]) -> str:
    """Join names with commas."""
    return ", ".join(str(name) for name in names)


def closest(name: str, candidates: Iterable[str], likeness: float = 0.6) -> str | None:
    """Return the candidate that ``name`` was probably meant to be; None if no candidate has at least this likeness, of at most 1."""
    by_lower_case = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=likeness)
    return by_lower_case[matches[0]] if matches else None


def unknown_name(key: str, name: str, known: Collection[str]) -> Problem:
    """Return the problem of a name that a table does not have."""
    match = closest(name, known)
    return Problem(key, show(name), f"one of: {listing(known)}", f"did you mean {match}?" if match else None)


def look_up[Entry](table: Mapping[str, Entry], key: str, name: str) -> Entry:
    """Return the entry that an option names.

    Args:
        key: the option.

    Raises:
        ConfigurationError: the table has no such entry.
    """
    if name not in table:
        raise ConfigurationError([unknown_name(key, name, table.keys())])
    return table[name]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
