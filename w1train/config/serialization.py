"""A configuration as YAML (the run directory's config.yaml), as flat keys, and the difference of two."""

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
    """Stands for a key that one of two configurations does not have."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """One key whose value differs; ``ABSENT`` where a configuration does not have the key (a stage's name, say)."""

    key: str
    old: Any
    new: Any


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number (YAML 1.1 reads it as a string) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, after checking that no key is repeated."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # the base class says that it cannot be a key
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key_node.value[:80]!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that writes line breaks other than \\n as escapes: read back in any other style, they come out as spaces."""

    def represent_string(self, text: str) -> yaml.ScalarNode:
        """Double quotes, which alone allow escapes, only where they are needed."""
        style = '"' if _LINE_BREAKS.search(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_LINE_BREAKS = re.compile("[\r\x85\u2028\u2029]")
_Dumper.add_representer(str, _Dumper.represent_string)

# Both sides must know it: the dumper quotes the string "0E0" because the loader would read a number.
for side in (_Loader, _Dumper):
    side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def config_to_yaml(config: Config) -> str:
    """The complete tree, every default included, in the schema's order. Reading it back gives an equal configuration, but for the passwords
    of URLs, which are written as ``***``."""
    return yaml.dump(mask_tree(dataclasses.asdict(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def config_from_yaml(source: str | Path) -> Config:
    """Read what ``config_to_yaml`` wrote: a file (``Path``) or the text itself (``str``).

    The same checks as for a recipe; raises ``ConfigurationError`` with every problem, ``UserError`` if the file is too large or no file,
    ``OSError`` if it cannot be read.
    """
    tree = read_mapping(source) if isinstance(source, Path) else _parse_mapping(source, "the YAML text")
    conversion = config_from_tree(tree)
    problems = conversion.problems + validate_conversion(conversion)
    if problems and isinstance(source, Path):
        # The keys alone do not say which of the files that a command reads is wrong.
        raise ConfigurationError(problems, origin=str(source))
    raise_if_any(problems)
    return conversion.config


def flatten(config: Config) -> dict[str, Any]:
    """Every value by its full key, in the schema's order, the passwords of URLs as ``***``; a list is one value."""
    return {key: mask_tree(value) for key, value in leaves(config)}


def find_masked(config: Config) -> list[Problem]:
    """The URLs that have come without their passwords, out of a run's config.yaml or the output of --cfg job."""
    valid = "the whole URL: *** stands for a password, which w1train writes nowhere"
    return [
        Problem(key, value, valid, f"export the URL, and give {key}='${{oc.env:VARIABLE}}'")
        for key, value in leaves(config)
        if isinstance(value, str) and is_masked(value)
    ]


def leaves(config: Config) -> Iterator[tuple[str, Any]]:
    """Every full key and its value as it is, with passwords."""
    return _leaves(dataclasses.asdict(config), "")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _leaves(child, join(key, name))
    else:
        yield key, value


def config_differences(old: Config, new: Config) -> list[Difference]:
    """List what changed, in the order of ``new``, then what only ``old`` has. Another password in a URL is no change: stored ones have
    none."""
    before, after = flatten(old), flatten(new)
    keys = [*after, *(key for key in before if key not in after)]
    pairs = ((key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in keys)
    return [Difference(key, old_value, new_value) for key, old_value, new_value in pairs if old_value != new_value]


def read_mapping(path: Path) -> Mapping[Any, Any]:
    """The mapping that a YAML file holds, unchecked.

    Raises:
        UserError: the file is too large or too deep, not YAML, or has no mapping at its top.
        OSError: it cannot be opened or read.
    """
    return _parse_mapping(read_bounded(path, LARGEST_YAML), str(path))


def _parse_mapping(text: str | bytes, name: str) -> Mapping[Any, Any]:
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        check_limits(text)
        tree = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:
        # ValueError: bytes that are not UTF-8, or a day that no month has. ArithmeticError: a time too far from now.
        fault = "what no configuration has" if isinstance(error, LimitError) else "text that is not YAML"
        raise ConfigurationError([Problem(name, f"{fault}: {error}", "the YAML of a configuration")]) from error
    if not isinstance(tree, Mapping):
        raise ConfigurationError([Problem(name, f"{type(tree).__name__} at the top", "a mapping with the keys of a configuration")])
    return tree
