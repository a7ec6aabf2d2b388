"""The directories of recipes, packaged and the user's, and checks of the user's directories."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from w1train.config.errors import Problem, listing
from w1train.config.reading import FileContentError, read_bounded, read_start
from w1train.config.yaml_limits import LARGEST_YAML, LimitError, check_limits

ROOT_NAME = "config"
RECIPE_GROUP = "recipe"
GLOBAL_HEADER = "# @package _global_"


@functools.cache
def packaged_directory() -> Path:
    """Return the directory of the ``recipes`` package, which is next to w1train in a checkout and in an installed wheel.

    The package is not imported: if a command starts in a directory with another ``recipes``, Python would find that package first.
    ``w1train.__file__`` cannot be used either: it is missing if a command starts next to the checkout that is installed.
    """
    directory = Path(__file__).resolve().parents[2] / "recipes"
    assert directory.is_dir(), f"the recipes package is not a directory: {directory}"
    return directory


def groups(directories: Sequence[Path]) -> dict[str, list[str]]:
    """Return the options of every group, sorted: {"model": ["llada_1b", ...], "recipe": [...], ...}."""
    options: dict[str, set[str]] = {}
    for directory in directories:
        for path in _recipe_files(directory, ".yaml"):
            relative = path.relative_to(directory).with_suffix("")
            if len(relative.parts) > 1:
                options.setdefault(relative.parts[0], set()).add("/".join(relative.parts[1:]))
    return {group: sorted(names) for group, names in sorted(options.items())}


def first_comment(directories: Sequence[Path], group: str, option: str) -> str:
    """Return a recipe file's description of itself: its first comment that is no directive to Hydra."""
    comments = (line.lstrip("# ").strip() for line in _lines(directories, group, option) if line.startswith("#") and line != GLOBAL_HEADER)
    return next(comments, "")


def recipe_is_global(directories: Sequence[Path], option: str) -> bool:
    """Tell whether a recipe's keys are set at the top of the tree. Hydra looks for the header only in the first lines."""
    return _lines(directories, RECIPE_GROUP, option)[:1] == [GLOBAL_HEADER]


def _lines(directories: Sequence[Path], group: str, option: str) -> list[str]:
    paths = [directory / group / f"{option}.yaml" for directory in directories]
    text = read_start(next(path for path in paths if path.is_file()), LARGEST_YAML).decode("utf-8", errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def check_user_directories(config_dirs: Sequence[str]) -> tuple[list[Path], list[Problem]]:
    """Return the absolute paths of the directories that exist, and the problems of all directories."""
    directories: list[Path] = []
    problems: list[Problem] = []
    for given in config_dirs:
        path = Path(given).expanduser().absolute()
        if path.is_dir():
            problems.extend(_misnamed(path))
            problems.extend(_shadowed(path, [packaged_directory(), *directories]))
            directories.append(path)
        else:
            found = "a file" if path.exists() else "nothing at this path"
            problems.append(Problem(f"--config-dir {given}", found, "a directory with groups of recipes, such as recipe/mine.yaml"))
    return directories, problems


def oversized(directories: Sequence[Path]) -> Iterator[Problem]:
    """Yield the files that Hydra would read and copy without a limit. Hydra reports other faults of a file when a recipe uses it."""
    for path in [path for directory in directories for path in _recipe_files(directory, ".yaml")]:
        try:
            check_limits(read_bounded(path, LARGEST_YAML).decode("utf-8"))
        except FileContentError as error:
            yield Problem(str(path), str(error), f"a recipe of at most {LARGEST_YAML:,} bytes")
        except LimitError as error:
            yield Problem(str(path), " ".join(str(error).split()), "a recipe within these limits")
        except (OSError, ValueError, yaml.YAMLError):
            continue


def _misnamed(directory: Path) -> Iterator[Problem]:
    """Report files with the extension .yml, which Hydra ignores silently."""
    for path in _recipe_files(directory, ".yml"):
        yield Problem(str(path), "the extension .yml", "the extension .yaml", f"rename it to {path.with_suffix('.yaml').name}")


def _shadowed(directory: Path, earlier: Sequence[Path]) -> Iterator[Problem]:
    """Report files whose name an earlier directory has: Hydra silently takes the first file, and would not use the user's file."""
    for path in _recipe_files(directory, ".yaml"):
        relative = path.relative_to(directory)
        hidden_by = [other / relative for other in earlier if (other / relative).is_file()]
        if hidden_by:
            taken = sorted(other.stem for other in hidden_by[0].parent.glob("*.yaml"))
            found = f"the name of {hidden_by[0]}, which would be used instead"
            yield Problem(str(path), found, f"a name other than {listing(taken)}", f"rename it to my_{relative.name}")


def _recipe_files(directory: Path, suffix: str) -> list[Path]:
    """List the root file and the files of existing groups. A user's directory may hold other files (it may be "."), which do not matter."""
    group_names = [path.name for path in packaged_directory().iterdir() if path.is_dir()]
    candidates = [directory / f"{ROOT_NAME}{suffix}"]
    for group in group_names:
        candidates.extend((directory / group).rglob(f"*{suffix}"))
    return sorted(path for path in candidates if path.is_file())
