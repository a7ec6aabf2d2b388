"""The examples of docs/extending.md: they are read from the page, and applied to the program of this process."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "extending.md"


@dataclass(frozen=True, slots=True)
class Example:
    """One section of the page."""

    stated_files: int
    """The number of files that the section states."""
    new_files: dict[str, str]
    """Path and text of each new file."""
    changes: dict[str, str]
    """Path and diff of each file that changes."""

    @property
    def num_files(self) -> int:
        return len(self.new_files) + len(self.changes)

    def register(self, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make the new files modules, and give the table in the changed file what it has after the change. Nothing else changes."""
        for path, text in self.new_files.items():
            execute(_module_name(path), text, monkeypatch)
        ((path, diff),) = self.changes.items()
        original = importlib.import_module(_module_name(path))
        with monkeypatch.context() as patch:
            changed = execute(_module_name(path), apply(diff, (REPOSITORY / path).read_text()), patch)
        found, wanted = getattr(original, table), getattr(changed, table)
        if not isinstance(found, dict):
            monkeypatch.setattr(original, table, wanted)
            return
        # Other modules have imported the dictionary itself.
        assert wanted.keys() > found.keys()
        for name in wanted.keys() - found.keys():
            monkeypatch.setitem(found, name, wanted[name])


def _module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def execute(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a module with this text, which can be imported under its name."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(text, f"{name} of {PAGE.name}", "exec"), module.__dict__)
    return module


def apply(diff: str, text: str) -> str:
    """Return the text after a change. The lines that a hunk expects must be in the text exactly once."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        assert text.count(before) == 1, f"{text.count(before)} times in the file:\n{before}"
        text = text.replace(before, after)
    return text


@cache
def examples() -> dict[str, Example]:
    """Return the sections of the page by their titles."""
    sections = re.split(r"^## (.*)\n", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {title: _example(text) for title, text in zip(sections[::2], sections[1::2], strict=True)}


def _example(text: str) -> Example:
    (stated,) = re.findall(r"^Files: (\d+)\.$", text, re.MULTILINE)
    return Example(int(stated), dict(_blocks(text, "python")), dict(_blocks(text, "diff")))


def _blocks(text: str, language: str) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the blocks of a language, which begin with a line that names the file."""
    for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        first, _, rest = block.partition("\n")
        yield first.removeprefix("# "), rest
