"""Limits on a YAML text, checked before anything is made of it: the configuration of a run, and the files of recipes.

Parsing yields events and does not recurse, so that neither ten thousand levels of nesting nor aliases that stand for billions of values
(ten lists of ten aliases to each other) cost more than the text itself.
"""

from __future__ import annotations

import yaml

from w1train.config.reading import LONGEST_INTEGER

LARGEST_YAML = 1 << 20
"""The most bytes of a configuration file."""
DEEPEST_YAML = 32
"""Levels of mappings and lists inside each other; the schema has six."""
MOST_YAML_NODES = 20_000
"""Keys and values of a file, each alias counted as what it stands for. One takes some twenty microseconds to read."""
_RESOLVER = yaml.resolver.Resolver()
_INTEGER = "tag:yaml.org,2002:int"
_NOT_SPECIFIC = "!"


class LimitError(yaml.MarkedYAMLError):
    """A text that holds more, or something else, than a configuration does."""


def check_limits(text: str) -> None:
    """Count the keys and values of a YAML text, and look at the scalars.

    Raises:
        LimitError: there are more keys and values than a configuration has, they are nested deeper, an integer is longer
            than LONGEST_INTEGER (Python would read hexadecimal digits without end), or a value has a tag such as !!bool (the library fails
            at a tag on a text that it does not fit).
        yaml.YAMLError: the text is not YAML.
    """
    num_nodes = 0
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _error(f"the alias *{event.anchor} stands for nothing that is complete before it", event)
            num_nodes += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            num_nodes += 1
            sizes[event.anchor or ""] = 1
            _check_scalar(event)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, num_nodes))
            num_nodes += 1
            _check_tag(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, num_before = open_nodes.pop()
            sizes[anchor or ""] = num_nodes - num_before
        if num_nodes > MOST_YAML_NODES:
            raise _error(f"there are more than {MOST_YAML_NODES} keys and values", event)
        if len(open_nodes) > DEEPEST_YAML:
            raise _error(f"it is nested deeper than {DEEPEST_YAML} levels", event)


def _check_scalar(event: yaml.ScalarEvent) -> None:
    _check_tag(event)
    # YAML's own rules say what an integer is: the name of a run may be a hash, whose first digit is decimal.
    if (
        event.implicit[0]
        and len(event.value) > LONGEST_INTEGER
        and _RESOLVER.resolve(yaml.ScalarNode, event.value, (True, False)) == _INTEGER
    ):
        raise _error(f"a number of {len(event.value)} characters is too long", event)


def _check_tag(event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> None:
    if event.tag not in (None, _NOT_SPECIFIC):
        raise _error(f"the tag {event.tag[:80]!r} is not supported: write the value as it is", event)


def _error(problem: str, event: yaml.Event) -> LimitError:
    return LimitError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]  # the stubs know of two classes of marks
