"""Which environment variables the sources read or set, found without running them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
_METHODS = {"get", "setdefault", "pop"}
_MAPPING = re.compile(r"env", re.IGNORECASE)
"""os.environ, and copies of it that are handed around: environ, environment, env, self._environment."""

# What bash sets by itself.
_SHELL_OWN = {"BASH_SOURCE", "BASH", "SECONDS", "PIPESTATUS", "RANDOM", "LINENO", "EUID", "UID", "PWD", "OLDPWD", "IFS", "OPTARG", "OPTIND"}
_SHELL_OWN |= {"FUNCNAME", "HOSTNAME", "BASHPID", "PPID", "SHELLOPTS", "BASH_VERSION", "BASH_REMATCH", "MAPFILE", "REPLY", "DIRSTACK"}
_MAKE_OWN = {"MAKEFILE_LIST", "MAKE", "CURDIR", "MAKEFLAGS", "SHELL"}


@dataclass(frozen=True, slots=True)
class Use:
    """One place where a variable is used."""

    name: str
    place: str
    """file:line."""


class UnknownNameError(Exception):
    """A name that can only be known by running the program."""


def in_python(text: str, place: str) -> Iterator[Use]:
    """os.environ[...], .get, .setdefault, .pop, ``in os.environ`` and os.getenv, of names that are literals or constants of the file.

    The same of any mapping with "env" in its name, as long as the key is in capitals.

    Raises:
        UnknownNameError: os.environ is asked for a name that is computed.
    """
    tree = ast.parse(text)
    constants = _constants(tree)
    for node in ast.walk(tree):
        for mapping, key in _accesses(node):
            name = key.value if isinstance(key, ast.Constant) else constants.get(key.id) if isinstance(key, ast.Name) else None
            line = f"{place}:{getattr(node, 'lineno', 0)}"
            if isinstance(name, str) and _NAME.fullmatch(name):
                yield Use(name, line)
            elif _is_os_environ(mapping):
                raise UnknownNameError(
                    f"{line}: the name of an environment variable must be a literal or a constant of the file, to be found"
                )


def _constants(tree: ast.Module) -> dict[str, object]:
    pairs = [(node.targets[0], node.value) for node in tree.body if isinstance(node, ast.Assign)]
    return {target.id: value.value for target, value in pairs if isinstance(target, ast.Name) and isinstance(value, ast.Constant)}


def _accesses(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(mapping, key)."""
    if isinstance(node, ast.Subscript) and _is_environment(node.value):
        yield node.value, node.slice
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn) and _is_environment(node.comparators[0]):
        yield node.comparators[0], node.left
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        function = node.func
        if (function.attr in _METHODS and _is_environment(function.value)) or function.attr in ("getenv", "putenv", "unsetenv"):
            yield function.value if function.attr in _METHODS else ast.parse("os.environ", mode="eval").body, node.args[0]


def _is_environment(node: ast.expr) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return _MAPPING.search(name) is not None


def _is_os_environ(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ" and isinstance(node.value, ast.Name) and node.value.id == "os"


def in_shell(text: str, place: str, also_assigned: frozenset[str] = frozenset()) -> Iterator[Use]:
    """$NAME and ${NAME...} that the script does not make itself, and what it exports. ``NAME="${NAME:-default}"`` is a use: the default
    is for who has not set it. ``also_assigned``: by the scripts that source this one."""
    lines = _without_comments(text)
    assigned = shell_assignments(text) | also_assigned | _SHELL_OWN
    for number, line in lines:
        for match in re.finditer(r"(?<!\\)\$(?:(\w+)|\{[!#]?(\w+)([^}]?))", line):
            name, operator = match[1] or match[2], match[3] or ""
            if _NAME.fullmatch(name) and (name not in assigned or (operator in (":", "-", "+", "=", "?") and name not in _SHELL_OWN)):
                yield Use(name, f"{place}:{number}")
        for name in _exported(line):
            yield Use(name, f"{place}:{number}")


def shell_assignments(text: str) -> frozenset[str]:
    """Names in capitals that a script assigns, loops over or reads into, other than for the one command that follows."""
    names: set[str] = set()
    for _, line in _without_comments(text):
        names.update(
            re.findall(
                r"(?:^|[;&|(]\s*|\b(?:local|export|declare|readonly|then|do|else)\s+(?:-\w+\s+)*)([A-Z][A-Z0-9_]*)\+?=", line.strip()
            )
        )
        names.update(re.findall(r"\b(?:for|read(?:\s+-\w+)*|local)\s+([A-Z][A-Z0-9_]*)\b", line))
    return frozenset(names)


def _exported(line: str) -> list[str]:
    found = re.match(r"\s*export\s+(.*)", line)
    return re.findall(r"(?:^|\s)([A-Z][A-Z0-9_]*)(?==|\s|$)", re.sub(r"\"[^\"]*\"|'[^']*'", "''", found[1])) if found else []


def _without_comments(text: str) -> list[tuple[int, str]]:
    return [(number, re.sub(r"(^|\s)#.*", "", line)) for number, line in enumerate(text.splitlines(), 1)]


def in_makefile(text: str, place: str) -> Iterator[Use]:
    """NAME ?= default, which the environment or the command line overrides, and $(NAME) that the file does not set."""
    lines = _without_comments(text)
    own = {match[1] for _, line in lines if (match := re.match(r"([A-Z][A-Z0-9_]*)\s*:?=", line))} | _MAKE_OWN
    for number, line in lines:
        names = re.findall(r"^([A-Z][A-Z0-9_]*)\s*\?=", line) + re.findall(r"\$[({]([A-Z][A-Z0-9_]*)[)}]", line)
        yield from (Use(name, f"{place}:{number}") for name in names if name not in own)


def in_dockerfile(text: str, place: str) -> Iterator[Use]:
    """What an image sets for all that runs in it; build arguments are not the environment."""
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        continued = number > 1 and lines[number - 2].endswith("\\") and _in_env(lines, number - 1)
        if line.startswith("ENV ") or continued:
            yield from (Use(name, f"{place}:{number}") for name in re.findall(r"(?:^|\s)([A-Z][A-Z0-9_]*)=", line))


def _in_env(lines: list[str], index: int) -> bool:
    while index > 0 and lines[index - 1].endswith("\\"):
        index -= 1
    return lines[index].startswith("ENV ")


def sources(repository: Path, folders: list[str]) -> Iterator[tuple[str, Path]]:
    """(kind, path) of all that may use one."""
    for folder in folders:
        for path in sorted((repository / folder).rglob("*")):
            if "__pycache__" in path.parts or not path.is_file():
                continue
            if path.suffix == ".py":
                yield "python", path
            elif path.suffix == ".sh":
                yield "shell", path
            elif path.name.startswith("Dockerfile"):
                yield "dockerfile", path
    yield "makefile", repository / "Makefile"


def all_uses(repository: Path, folders: list[str]) -> Iterator[Use]:
    """Every place, in the order of files and lines."""
    for kind, path in sources(repository, folders):
        text, place = path.read_text(), str(path.relative_to(repository))
        if kind == "python":
            yield from in_python(text, place)
        elif kind == "shell":
            yield from in_shell(text, place, _assigned_by_callers(path))
        elif kind == "dockerfile":
            yield from in_dockerfile(text, place)
        else:
            yield from in_makefile(text, place)


def _assigned_by_callers(script: Path) -> frozenset[str]:
    """By the scripts beside it that source it."""
    callers = [
        other
        for other in script.parent.glob("*.sh")
        if other != script and re.search(rf"(?:source|\.)\s+\S*{script.name}", other.read_text())
    ]
    return frozenset().union(*(shell_assignments(other.read_text()) for other in callers))
