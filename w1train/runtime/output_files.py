"""The check that a command makes before it writes: no output is an input, and a file that exists is replaced only on request."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from w1train.config.errors import UserError
from w1train.runtime.files import PARTIAL_SUFFIX

_MOST_NAMES = 5
"""The most existing files that a message names."""


class OutputError(UserError):
    """The error of outputs that would replace something. The message names each of them."""


type _Identity = tuple[int, int]


def require_writable(
    outputs: Sequence[str | Path], inputs: Iterable[str | Path], *, overwrite: bool | None, also_written: Sequence[str | Path] = ()
) -> None:
    """Refuse outputs that are inputs, that exist, or that are one file, before anything is written.

    Files are compared by device and inode: a link, ``./``, or another spelling on a file system that ignores case is the same file.

    Args:
        outputs: the files to write. The name of a file while it is written (PARTIAL_SUFFIX) may exist, but may not be an input either.
        inputs: the files that the command reads. They are looked at only if something has the name of an output, so that the check of a
            corpus of a million files takes no time.
        overwrite: replace files that exist; None = do not, and the command has no option for it. An input is never replaced.
        also_written: names of further files that exist only for a while, which may be there from an earlier command.

    Raises:
        OutputError: a message about all such outputs.
    """
    wanted = [Path(path) for path in outputs]
    passing = [Path(path) for path in also_written]
    # A path without a name, such as ".", is a directory, which is refused below.
    passing += [path.with_name(path.name + PARTIAL_SUFFIX) for path in [*wanted, *passing] if path.name]
    there = {path: found for path in [*wanted, *passing] if (found := _identity(path))}
    sources = {found: path for path in inputs if (found := _identity(path))} if there else {}
    replaced = set(wanted)
    problems = _double(wanted)
    problems += [f"{path} is the input {sources[found]}, which is never replaced" for path, found in there.items() if found in sources]
    left = [path for path, found in there.items() if found not in sources]
    problems += [f"{path} is a directory" for path in left if path.is_dir()]
    if not overwrite and (old := [path for path in left if path in replaced and not path.is_dir()]):
        names = ", ".join(map(str, old[:_MOST_NAMES]))
        advice = "remove it or choose another name" if overwrite is None else "choose another name, or give --overwrite"
        problems.append(f"{names} {'exists' if len(old) == 1 else 'exist'} already: {advice}")
    if problems:
        raise OutputError("nothing was written: " + "; ".join(problems))


def require_apart(outputs: Sequence[Path], sources: Sequence[Path]) -> None:
    """Refuse directories to write, which may be emptied before, that are, hold or lie inside of a directory that is read.

    Raises:
        OutputError: a message about all such directories.
    """
    problems = [
        f"{output} and {source}, which is read, are not apart"
        for output in outputs
        for source in sources
        if (_identity(source) and _identity(output) == _identity(source)) or is_inside(output, source) or is_inside(source, output)
    ]
    if problems:
        raise OutputError(f"nothing was written: {'; '.join(problems)}: choose another name")


def is_inside(path: Path, directory: Path) -> bool:
    """Tell whether a path, which need not exist, is below a directory, whatever links and spellings lead to it."""
    wanted = _identity(directory)
    return wanted is not None and any(_identity(parent) == wanted for parent in Path(os.path.realpath(path)).parents)


def _identity(path: str | Path) -> _Identity | None:
    """Return the device and inode of the file that a path leads to, or of a link that leads nowhere; None if nothing has this name."""
    try:
        status = os.stat(path)
    except OSError:  # a link that leads nowhere, or to itself, has the name too
        try:
            status = os.lstat(path)
        except OSError:
            return None
    return status.st_dev, status.st_ino


def _double(paths: Sequence[Path]) -> list[str]:
    """Describe outputs that are one file under two names."""
    first: dict[str | _Identity, Path] = {}
    problems = []
    for path in paths:
        key = _identity(path) or os.path.realpath(path)
        if key in first:
            problems.append(f"{path} and {first[key]} are the same file")
        first.setdefault(key, path)
    return problems
