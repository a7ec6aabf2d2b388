"""Limits on the YAML of configurations and recipes, which are checked before any object is built from the text.

The parser yields events and does not recurse. Ten thousand levels of nesting, or aliases that stand for billions of values (ten lists of
ten aliases to each other), therefore cost no more than the text itself.
"""

from __future__ import annotations

import yaml

from w1train.config.reading import LONGEST_INTEGER

LARGEST_YAML = 1 << 20
"""Most bytes of a configuration file."""
DEEPEST_YAML = 32
"""Most levels of nested mappings and lists; the schema has six."""
MOST_YAML_NODES = 20_000
"""Most keys and values of a file; an alias counts as many times as the keys and values that it stands for. Reading one key or value takes
about 20 microseconds."""
_RESOLVER = yaml.resolver.Resolver()
_INTEGER = "tag:yaml.org,2002:int"
_NOT_SPECIFIC = "!"


class LimitError(yaml.MarkedYAMLError):
    """A text that exceeds the limits of a configuration."""


def check_limits(text: str) -> None:
    """Check the limits on the keys, values, nesting and scalars of a YAML text.

    Raises:
        LimitError: the text has too many keys and values or is nested too deep, an integer is longer than LONGEST_INTEGER (Python has
            no limit for hexadecimal digits), or a value has a tag such as !!bool (the library fails where a tag does not fit its value).
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
    # Only YAML's own rules tell what an integer is: the name of a run may be a hash that begins with a decimal digit.
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
    return LimitError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]  # the stubs have two classes of marks
