"""Configurations for the tests of this directory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.config.config_trees import TREE, set_key
from w1train.config.from_tree import config_from_tree
from w1train.config.schema import Config


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """Return a function from changes by dotted key to a configuration, which is not validated."""

    def make(changes: dict[str, Any] | None = None) -> Config:
        changed = copy.deepcopy(TREE)
        for key, value in (changes or {}).items():
            set_key(changed, key, value)
        conversion = config_from_tree(changed)
        assert not conversion.problems, conversion.problems
        return conversion.config

    return make
