"""Rules of the run as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator

from w1train.config.errors import Problem, show
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config

_NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]+")


def _run_rule(config: Config) -> Iterator[Problem]:
    if not _NAME_PATTERN.fullmatch(config.name) or config.name in (".", ".."):
        yield Problem("name", show(config.name), "a directory name of letters, digits, '.', '_' and '-'")


RUN_RULES: tuple[Rule, ...] = (_run_rule,)
