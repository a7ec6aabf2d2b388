"""How much a YAML text may hold, counted before anything is made of it.

Parsing yields events and does not recurse, so that neither ten thousand levels of nesting nor aliases that stand for billions of values
(ten lists of ten aliases to each other) cost more than the text itself.
"""

from __future__ import annotations

import yaml

LARGEST_YAML = 1 << 20
"""Bytes of a configuration file."""
DEEPEST_YAML = 32
"""Levels of mappings and lists inside each other; the schema has six."""
MOST_YAML_NODES = 20_000
"""Keys and values of a file, each alias counted as what it stands for. One takes some twenty microseconds to read."""


class ExtentError(yaml.MarkedYAMLError):
    """A text that holds more than a configuration does."""


def check_extent(text: str) -> None:
    """Count the keys and values of a YAML text.

    Raises:
        ExtentError: there are more of them, or they are nested deeper, than a configuration has.
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
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, num_nodes))
            num_nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, num_before = open_nodes.pop()
            sizes[anchor or ""] = num_nodes - num_before
        if num_nodes > MOST_YAML_NODES:
            raise _error(f"there are more than {MOST_YAML_NODES} keys and values", event)
        if len(open_nodes) > DEEPEST_YAML:
            raise _error(f"it is nested deeper than {DEEPEST_YAML} levels", event)


def _error(problem: str, event: yaml.Event) -> ExtentError:
    return ExtentError(problem=problem, problem_mark=event.start_mark)
