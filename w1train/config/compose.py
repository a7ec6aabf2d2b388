"""The composition of recipes and overrides to a checked configuration.

Hydra composes plain YAML: it decides which files are merged, and in which order. This module then sets the values from the command line,
and ``w1train.config.from_tree`` decides what is valid. Hydra itself would stop at the first mistake, and accept ``+model.hiden_size=1`` and
text for numbers. Its compose API writes no files, so any number of ranks may compose at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.version import VersionBase
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from w1train.config.constraints import LARGEST_INTEGER
from w1train.config.errors import NOT_GIVEN, Problem, closest, first_line, listing, raise_if_any, show
from w1train.config.from_tree import config_from_tree
from w1train.config.recipe_files import (
    GLOBAL_HEADER,
    RECIPE_GROUP,
    ROOT_NAME,
    check_user_directories,
    groups,
    oversized,
    packaged_directory,
    recipe_is_global,
)
from w1train.config.rules.rule import Rule
from w1train.config.rules.validate import validate_conversion
from w1train.config.schema import Config
from w1train.config.serialization import find_masked

_ALL_SECTIONS = frozenset(config_field.name for config_field in dataclasses.fields(Config))
_MISSING_VALUE = "???"


@dataclass(slots=True)
class _Request:
    """The choices and edits that the overrides ask for."""

    choices: dict[str, str] = field(default_factory=dict)
    """The chosen option of each group; "null" stands for no option."""
    edits: list[Override] = field(default_factory=list)
    """Values to set and keys to remove, in order."""
    unknown_sections: frozenset[str] = frozenset()
    """Sections that a recipe file would have set, but the file does not exist."""
    problems: list[Problem] = field(default_factory=list)


def load_config(overrides: Sequence[str], config_dirs: Sequence[str] = (), rules: Sequence[Rule] = ()) -> Config:
    """Compose recipes and overrides (``recipe=w1_4b``, ``parallel.tensor=4``, ``~schedule.stages.decay``) to a valid configuration.

    A mapping in an override is merged into the tree, every other value replaces what was there, and ``~key`` goes back to the default.

    Args:
        config_dirs: the user's directories of recipes, in addition to the packaged recipes.
        rules: what the caller checks beside the rules of the configuration.

    Raises:
        ConfigurationError: with every problem of the overrides, the recipe files and the configuration.
    """
    user_directories, problems = check_user_directories(config_dirs)
    if too_large := list(oversized(user_directories)):
        # Hydra would read these files without a limit.
        raise_if_any(problems + too_large)
    directories = [packaged_directory(), *user_directories]
    options = groups(directories)
    request = _read_overrides(overrides, options, directories)
    problems += request.problems
    try:
        tree, unknown_sections = _compose(request.choices, user_directories), request.unknown_sections
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        # Hydra raises these for an invalid defaults list, a file that is not UTF-8 (ValueError) or that is a number (OSError), and a
        # defaults list that includes itself (RecursionError).
        problems.append(_composition_problem(error, options))
        tree, unknown_sections = {}, _ALL_SECTIONS
    tree = {section: value for section, value in tree.items() if section not in unknown_sections}
    problems += _apply(request.edits, tree, unknown_sections)
    tree, unresolved = _resolve(tree)
    conversion = config_from_tree(tree, unknown_sections, _typed_texts(request.edits))
    problems += unresolved + _no_recipe(request.choices, conversion.problems, options) + conversion.problems
    problems += find_masked(conversion.config) if conversion.complete else []
    raise_if_any(problems + validate_conversion(conversion, rules))
    return conversion.config


def _read_overrides(overrides: Sequence[str], options: Mapping[str, Sequence[str]], directories: Sequence[Path]) -> _Request:
    request = _Request()
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            request.problems.append(_syntax_problem(text, error, options))
            continue
        except ValueError as error:
            # Python raises this error for an integer of thousands of digits, and Hydra does not catch it.
            key = text.lstrip("+~").partition("=")[0]
            request.problems.append(Problem(key, f"a number: {error}", f"an integer of at most {LARGEST_INTEGER}, or text in quotes"))
            continue
        key = override.key_or_group
        if not key or override.package is not None:
            request.problems.append(Problem(text, "a key that is empty or has '@'", "KEY=VALUE with a key such as model.hidden_size"))
        elif override.is_sweep_override():
            found = f"the sweep {text.partition('=')[2]}"
            request.problems.append(Problem(key, found, "one value (a run is one configuration)", "a list is [1,2]"))
        elif key in options and not override.is_delete() and not isinstance(override.value(), dict):
            _choose(request, key, override, options[key], directories)
        else:
            request.edits.append(override)
    return request


def _choose(request: _Request, group: str, override: Override, options: Sequence[str], directories: Sequence[Path]) -> None:
    value = override.value()
    option = "null" if value is None else value if isinstance(value, str) else _typed_text(override)
    if isinstance(value, list) or not option:
        problem = Problem(group, show(value), f"one name: {listing(options)}")
    elif option != "null" and option not in options:
        match = closest(option.removesuffix(".yaml"), options)
        suggestion = f"{group}={match}" if match else f"a file of yours: DIR/{group}/{option}.yaml with --config-dir DIR"
        problem = Problem(group, show(value), f"one of: {listing(options)}", suggestion)
    elif group == RECIPE_GROUP and option != "null" and not recipe_is_global(directories, option):
        found = f"a first line other than '{GLOBAL_HEADER}', so its keys would be set below the key '{RECIPE_GROUP}'"
        problem = Problem(f"{RECIPE_GROUP}/{option}.yaml", found, f"'{GLOBAL_HEADER}' as the first line")
    else:
        request.choices[group] = option
        return
    request.problems.append(problem)
    request.unknown_sections |= _ALL_SECTIONS if group == RECIPE_GROUP else {group}


def _typed_text(override: Override) -> str:
    return (override.input_line or "").partition("=")[2].strip()


def _syntax_problem(text: str, error: HydraException, options: Mapping[str, Sequence[str]]) -> Problem:
    if "=" not in text and not text.startswith("~"):
        recipe = closest(text, options[RECIPE_GROUP])
        return Problem(text, "no '='", "KEY=VALUE or GROUP=OPTION", f"{RECIPE_GROUP}={recipe}" if recipe else None)
    key, _, value = text.partition("=")
    if not _is_readable(f"{key}=0"):
        return _key_problem(text, key)
    found = f"text that cannot be read ({first_line(error)})"
    return Problem(text, found, "KEY=VALUE; special characters in quotes", _in_quotes(key, value))


def _key_problem(text: str, key: str) -> Problem:
    name, bracket, _ = key.lstrip("+~").partition("[")
    if name and bracket and _is_readable(f"{name}=0"):
        return Problem(text, "a key with an index", "names with dots between them; a list is set as a whole, KEY=[VALUE, ...]")
    return Problem(text, f"the key {show(key)}", "KEY=VALUE with names and single dots in the key, such as model.hidden_size")


def _in_quotes(key: str, value: str) -> str | None:
    """Suggest the value in quotes for Hydra and a shell, if quotes make it readable."""
    is_plain = value.isprintable() and "'" not in value and "${" not in value
    return f"""{key}='"{value}"'""" if is_plain and _is_readable(f'{key}="{value}"') else None


def _is_readable(text: str) -> bool:
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        return False
    return True


@contextmanager
def _hydra(directory: Path) -> Iterator[None]:
    """Set Hydra's global state for one composition, and restore it afterwards for callers that use Hydra themselves."""
    global_hydra, version = GlobalHydra.instance().hydra, VersionBase.instance().version_base
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(directory), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = global_hydra
        VersionBase.instance().version_base = version


def _compose(choices: Mapping[str, str], user_directories: Sequence[Path]) -> dict[str, Any]:
    """Return the tree that the chosen files make; its interpolations are not resolved yet."""
    search_path = ",".join(_quote(f"file://{directory}") for directory in user_directories)
    overrides = [f"{group}={option if option == 'null' else _quote(option)}" for group, option in choices.items()]
    with _hydra(packaged_directory()):
        composed = compose(ROOT_NAME, [*overrides, f"hydra.searchpath=[{search_path}]"])
    tree = OmegaConf.to_container(composed)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _quote(text: str) -> str:
    """Return a string in the grammar of Hydra's overrides."""
    return "'" + text.replace("'", "\\'") + "'"


def _composition_problem(error: Exception, options: Mapping[str, Sequence[str]]) -> Problem:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.partition("/")
        if group in options:
            match = closest(option, options[group])
            found = f"{show(option)}, in the defaults of a recipe file ({first_line(error)})"
            return Problem(group, found, f"one of: {listing(options[group])}", f"did you mean {match}?" if match else None)
    reason = "a defaults list that includes itself" if isinstance(error, RecursionError) else " ".join(str(error).split())
    return Problem("the recipe files", reason, "YAML files that Hydra can compose")


def _apply(edits: Sequence[Override], tree: dict[str, Any], unknown_sections: frozenset[str]) -> list[Problem]:
    problems = []
    for edit in edits:
        *parents, name = edit.key_or_group.split(".")
        node = tree
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                # A scalar on the path is replaced by a mapping, which the conversion then reports as invalid.
                node[parent] = {}
            node = node[parent]
        if not edit.is_delete():
            _merge(node, name, edit.value())
        elif name in node:
            del node[name]
        elif edit.key_or_group.partition(".")[0] not in unknown_sections:
            problems.append(_nothing_to_remove(edit.key_or_group, name, node))
    return problems


def _typed_texts(edits: Sequence[Override]) -> dict[str, str]:
    """Return the text that was typed for numbers and booleans, by key. The value alone does not tell it: 1e3 becomes 1000.0."""
    texts: dict[str, str] = {}
    for edit in edits:
        key = edit.key_or_group
        # An override of a key replaces everything that was typed for keys below it.
        texts = {other: text for other, text in texts.items() if not f"{other}.".startswith(f"{key}.")}
        if isinstance(edit.value(), int | float):
            texts[key] = _typed_text(edit)
    return texts


def _nothing_to_remove(key: str, name: str, node: Mapping[str, Any]) -> Problem:
    match = closest(name, node)
    suggestion = f"did you mean ~{key.removesuffix(name)}{match}?" if match else None
    return Problem(f"~{key}", "nothing: no recipe sets this key", f"a key that is set: {listing(node) or 'no key is set here'}", suggestion)


def _merge(node: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, dict) and isinstance(node.get(name), dict):
        for child_name, child in value.items():
            _merge(node[name], child_name, child)
    else:
        node[name] = value


def _resolve(tree: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Resolve interpolations (``${data.train}``, ``${oc.env:HOME}``), and leave out keys whose value is ``???``."""
    tree = _without_missing(tree)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "the recipe files"
        return tree, [Problem(key, f"an interpolation: {first_line(error)}", "${KEY} of a key that is set, or ${oc.env:VARIABLE}")]
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}, []


def _without_missing(tree: Mapping[str, Any]) -> dict[str, Any]:
    present = {key: value for key, value in tree.items() if value != _MISSING_VALUE}
    return {key: _without_missing(value) if isinstance(value, dict) else value for key, value in present.items()}


def _no_recipe(choices: Mapping[str, str], problems: Sequence[Problem], options: Mapping[str, Sequence[str]]) -> list[Problem]:
    """Return the problem that no recipe was chosen, which is reported before the keys that are missing for this reason."""
    if RECIPE_GROUP in choices or not any(problem.found == NOT_GIVEN for problem in problems):
        return []
    return [Problem(RECIPE_GROUP, NOT_GIVEN, f"a complete run: {listing(options[RECIPE_GROUP])}", f"{RECIPE_GROUP}=demo")]
