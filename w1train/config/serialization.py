"""Configurations as YAML (config.yaml of a run directory) and as flat keys, and differences between two configurations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from w1train.config.credentials import is_masked, mask_tree
from w1train.config.errors import ConfigurationError, Problem, raise_if_any
from w1train.config.field_types import join
from w1train.config.from_tree import config_from_tree
from w1train.config.reading import read_bounded
from w1train.config.rules.validate import validate_conversion
from w1train.config.schema import Config
from w1train.config.yaml_limits import LARGEST_YAML, LimitError, check_limits


class _Absent:
    """The value of a key that one of two configurations does not have."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """A key whose value differs. The value is ``ABSENT`` where a configuration does not have the key, such as a stage's name."""

    key: str
    old: Any
    new: Any


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number (YAML 1.1 reads it as a string) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping after checking that no key is repeated."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # the base class reports that this node cannot be a key
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key_node.value[:80]!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that writes line breaks other than \\n as escapes: in every other style they would be read back as spaces."""

    def represent_string(self, text: str) -> yaml.ScalarNode:
        """Return a scalar in double quotes, which alone allow escapes, if it needs an escape; otherwise a plain scalar."""
        style = '"' if _LINE_BREAKS.search(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_LINE_BREAKS = re.compile("[\r\x85\u2028\u2029]")
_Dumper.add_representer(str, _Dumper.represent_string)

# Loader and dumper must both have this rule: the dumper quotes the string "0E0" because the loader would read a number.
for side in (_Loader, _Dumper):
    side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def config_to_yaml(config: Config) -> str:
    """Return the complete tree as YAML, with every default, in the order of the schema.

    Reading it back gives an equal configuration, except for passwords of URLs, which are written as ``***``.
    """
    return yaml.dump(mask_tree(dataclasses.asdict(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def config_from_yaml(source: str | Path) -> Config:
    """Read a configuration that ``config_to_yaml`` wrote, from a file (``Path``) or from the text itself (``str``).

    The configuration is checked like a recipe.

    Raises:
        ConfigurationError: with every problem of the configuration.
        UserError: the file is too large, or the path is not a regular file.
        OSError: the file cannot be read.
    """
    tree = read_mapping(source) if isinstance(source, Path) else _parse_mapping(source, "the YAML text")
    conversion = config_from_tree(tree)
    problems = conversion.problems + validate_conversion(conversion)
    if problems and isinstance(source, Path):
        # A command may read several configurations, and the keys alone do not tell which file is wrong.
        raise ConfigurationError(problems, origin=str(source))
    raise_if_any(problems)
    return conversion.config


def flatten(config: Config) -> dict[str, Any]:
    """Return every value by its full key, in the order of the schema, with ``***`` for passwords of URLs. A list is one value."""
    return {key: mask_tree(value) for key, value in leaves(config)}


def find_masked(config: Config) -> list[Problem]:
    """Return a problem for each URL that has lost its password, because it comes from a config.yaml or from the output of --cfg job."""
    valid = "the whole URL: *** stands for a password, which w1train writes nowhere"
    return [
        Problem(key, value, valid, f"export the URL, and give {key}='${{oc.env:VARIABLE}}'")
        for key, value in leaves(config)
        if isinstance(value, str) and is_masked(value)
    ]


def leaves(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield every full key and its value, passwords included."""
    return _leaves(dataclasses.asdict(config), "")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _leaves(child, join(key, name))
    else:
        yield key, value


def config_differences(old: Config, new: Config) -> list[Difference]:
    """List the keys that differ in the order of ``new``, then the keys that only ``old`` has.

    Another password in a URL is no difference, because stored configurations contain no passwords.
    """
    before, after = flatten(old), flatten(new)
    keys = [*after, *(key for key in before if key not in after)]
    pairs = ((key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in keys)
    return [Difference(key, old_value, new_value) for key, old_value, new_value in pairs if old_value != new_value]


def read_mapping(path: Path) -> Mapping[Any, Any]:
    """Return the mapping that a YAML file holds, without checking its keys.

    Raises:
        UserError: the file is too large, nested too deep or not YAML, or its top is not a mapping.
        OSError: the file cannot be opened or read.
    """
    return _parse_mapping(read_bounded(path, LARGEST_YAML), str(path))


def _parse_mapping(text: str | bytes, name: str) -> Mapping[Any, Any]:
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        check_limits(text)
        tree = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:
        # ValueError: the text is not UTF-8 or has an impossible date. ArithmeticError: a date is outside of the calendar.
        fault = "a text beyond the limits of a configuration" if isinstance(error, LimitError) else "text that is not YAML"
        raise ConfigurationError([Problem(name, f"{fault}: {error}", "the YAML of a configuration")]) from error
    if not isinstance(tree, Mapping):
        raise ConfigurationError([Problem(name, f"{type(tree).__name__} at the top", "a mapping with the keys of a configuration")])
    return tree
