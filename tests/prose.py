"""A linter of prose: docstrings, comments, messages, documentation pages and comments of recipes.

    python -m tests.prose                  # all of the project
    python -m tests.prose w1train/engine   # some of it

tests/prose_words.toml has the words. The rules are in docs/writing.md.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from w1train.config.argument_parser import ArgumentParser

REPOSITORY = Path(__file__).resolve().parent.parent
PYTHON_FOLDERS = ("w1train", "data_tools", "launch", "benchmarks", "docs/site")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "recipes/**/*.yaml")
_CODE = re.compile(r"```.*?```|``[^`]*``|`[^`]*`|\"[^\"\n]*\"|https?://\S+", re.DOTALL)
_TABLE_RULE = re.compile(r"\|\s*:?-{3,}:?\s*\|")
_TABLE_RULE_ALONE = re.compile(r"\s*\|(\s*:?-{3,}:?\s*\|)+\s*")
_SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:", "Shapes:")


@dataclass(frozen=True, slots=True)
class Problem:
    """A place in a file and what is wrong there."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


@cache
def words() -> dict:
    """Return the word lists."""
    return tomllib.loads((REPOSITORY / "tests" / "prose_words.toml").read_text())


@cache
def verbs() -> frozenset[str]:
    """Return the verbs that a function's docstring may begin with, as they are written there."""
    return frozenset(words()["docstrings"]["verbs"].split())


@cache
def _bad_beginnings() -> frozenset[str]:
    return frozenset(words()["docstrings"]["no_class_begins_with"].split())


@cache
def _phrases() -> list[tuple[re.Pattern[str], str]]:
    # A phrase may be broken over two lines.
    return [(re.compile(rf"(?<![\w-]){pattern}(?![\w-])".replace(" ", r"\s+")), better) for pattern, better in words()["phrases"].items()]


def phrase_problems(text: str) -> Iterator[tuple[int, str]]:
    """Yield (offset of the line in the text, problem) for each phrase that has a plainer form. Code and quotations are left out."""
    prose = _CODE.sub(lambda match: re.sub(r"[^\n]", "_", match.group(0)), text)
    for pattern, better in _phrases():
        for match in pattern.finditer(prose):
            yield prose.count("\n", 0, match.start()), f"{match.group(0)!r}: {better}"


def docstring_problems(node: ast.AST, docstring: str) -> Iterator[str]:
    """Yield what is wrong with the first word of a docstring of a function, a class or a module."""
    first = docstring.split()[0] if docstring.split() else ""
    word = first.rstrip(",.:;")
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        if not _is_property(node) and first not in _SECTIONS and word not in verbs():
            yield f"the docstring of {node.name} begins with {word!r}, not with a verb (tests/prose_words.toml lists the verbs)"
    elif isinstance(node, ast.ClassDef | ast.Module) and word in _bad_beginnings():
        yield f"the docstring of {getattr(node, 'name', 'the module')} begins with {word!r}, not with a noun"


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell whether a function is read as a value, so that its docstring is a noun."""
    names = {part.id if isinstance(part, ast.Name) else getattr(part, "attr", "") for part in node.decorator_list}
    return bool(names & {"property", "cached_property", "setter"})


def python_problems(path: Path) -> Iterator[Problem]:
    """Yield the problems of docstrings, comments and messages of a Python file."""
    source = path.read_text()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            yield from (Problem(path, node.body[0].lineno, problem) for problem in docstring_problems(node, text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and str(node.value.value).lstrip().startswith("Whether "):
            yield Problem(
                path, node.lineno, "'Whether' begins a docstring: write 'Tell whether ...', 'This flag tells whether ...' or 'True: ...'"
            )
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield from (Problem(path, node.lineno + offset, problem) for offset, problem in phrase_problems(node.value))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield from (Problem(path, token.start[0], problem) for _, problem in phrase_problems(token.string))


def table_problems(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line in the text, problem) for each table of Markdown whose rows were wrapped into a paragraph. Code is left out."""
    for offset, line in enumerate(_CODE.sub(lambda match: re.sub(r"[^\n]", "_", match.group(0)), text).split("\n")):
        if _TABLE_RULE.search(line) and not _TABLE_RULE_ALONE.fullmatch(line):
            yield offset, "a table's row of dashes has other text on its line: write each row of the table on its own line"


def page_problems(path: Path) -> Iterator[Problem]:
    """Yield the problems of a page in Markdown, or of the comments of a recipe."""
    text = path.read_text()
    if path.suffix == ".yaml":
        text = "\n".join(line.partition("#")[2] for line in text.split("\n"))
    found = [*phrase_problems(text), *(table_problems(text) if path.suffix == ".md" else ())]
    yield from (Problem(path, 1 + offset, problem) for offset, problem in found)


def all_files() -> list[Path]:
    """Return the files that the linter reads."""
    python = [path for folder in PYTHON_FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return python + [path for pattern in PAGES for path in sorted(REPOSITORY.glob(pattern))]


def problems(path: Path) -> list[Problem]:
    """Return all problems of a file."""
    return sorted(python_problems(path) if path.suffix == ".py" else page_problems(path), key=lambda problem: problem.line)


def main(arguments: Sequence[str]) -> int:
    """Print the problems of the files that lie in the given folders, or of all files."""
    parser = ArgumentParser(prog="python -m tests.prose", description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders or files to read (default: all of the project)")
    folders = [folder.resolve() for folder in parser.parse_args(arguments).folders] or [REPOSITORY]
    chosen = [path for path in all_files() if any(path.is_relative_to(folder) for folder in folders)]
    found = [problem for path in chosen for problem in problems(path)]
    for problem in found:
        print(f"{problem.path.relative_to(REPOSITORY)}:{problem.line}: {problem.text}")
    print(f"{len(found)} problems in {len(chosen)} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
