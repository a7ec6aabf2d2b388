"""Where recipes are, packaged and the user's, and what is wrong with a user's directory."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from w1train.config.errors import Problem, listing
from w1train.config.reading import FileContentError, read_bounded
from w1train.config.yaml_limits import LARGEST_YAML, LimitError, check_limits

ROOT_NAME = "config"
RECIPE_GROUP = "recipe"
GLOBAL_HEADER = "# @package _global_"


@functools.cache
def packaged_directory() -> Path:
    """The directory of the ``recipes`` package, beside w1train in a checkout as in an installed wheel. Python's own search would find the
    user's ``recipes`` first, where a command starts beside a directory of that name; nor is w1train itself asked, which has no
    ``__file__`` where a command starts beside the checkout that it is installed from."""
    directory = Path(__file__).resolve().parents[2] / "recipes"
    assert directory.is_dir(), f"the recipes package is not a directory: {directory}"
    return directory


def groups(directories: Sequence[Path]) -> dict[str, list[str]]:
    """The options of every group, sorted: {"model": ["llada_1b", ...], "recipe": [...], ...}."""
    options: dict[str, set[str]] = {}
    for directory in directories:
        for path in _recipe_files(directory, ".yaml"):
            relative = path.relative_to(directory).with_suffix("")
            if len(relative.parts) > 1:
                options.setdefault(relative.parts[0], set()).add("/".join(relative.parts[1:]))
    return {group: sorted(names) for group, names in sorted(options.items())}


def first_comment(directories: Sequence[Path], group: str, option: str) -> str:
    """What a recipe file says it is: its first comment that is no directive to Hydra."""
    comments = (line.lstrip("# ").strip() for line in _lines(directories, group, option) if line.startswith("#") and line != GLOBAL_HEADER)
    return next(comments, "")


def recipe_is_global(directories: Sequence[Path], option: str) -> bool:
    """Whether a recipe's keys are set at the top of the tree. Hydra looks for the header on the first lines only."""
    return _lines(directories, RECIPE_GROUP, option)[:1] == [GLOBAL_HEADER]


def _lines(directories: Sequence[Path], group: str, option: str) -> list[str]:
    paths = [directory / group / f"{option}.yaml" for directory in directories]
    with next(path for path in paths if path.is_file()).open("rb") as file:
        text = file.read(LARGEST_YAML).decode("utf-8", errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def check_user_directories(config_dirs: Sequence[str]) -> tuple[list[Path], list[Problem]]:
    """Absolute paths of the usable directories, and the problems of all."""
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
    """The files that Hydra would read and copy without a limit. What is wrong with a file otherwise is Hydra's to say, if a recipe uses the
    file."""
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
    """Hydra passes over .yml files without a word."""
    for path in _recipe_files(directory, ".yml"):
        yield Problem(str(path), "the extension .yml", "the extension .yaml", f"rename it to {path.with_suffix('.yaml').name}")


def _shadowed(directory: Path, earlier: Sequence[Path]) -> Iterator[Problem]:
    """Hydra takes the first of two files of one name without a word, so a user's variant of a packaged one would not be used."""
    for path in _recipe_files(directory, ".yaml"):
        relative = path.relative_to(directory)
        hidden_by = [other / relative for other in earlier if (other / relative).is_file()]
        if hidden_by:
            taken = sorted(other.stem for other in hidden_by[0].parent.glob("*.yaml"))
            found = f"the name of {hidden_by[0]}, which would be used instead"
            yield Problem(str(path), found, f"a name other than {listing(taken)}", f"rename it to my_{relative.name}")


def _recipe_files(directory: Path, suffix: str) -> list[Path]:
    """The root file and the files of groups that exist; the rest of a user's directory is none of our business (it may be ".")."""
    group_names = [path.name for path in packaged_directory().iterdir() if path.is_dir()]
    candidates = [directory / f"{ROOT_NAME}{suffix}"]
    for group in group_names:
        candidates.extend((directory / group).rglob(f"*{suffix}"))
    return sorted(path for path in candidates if path.is_file())
