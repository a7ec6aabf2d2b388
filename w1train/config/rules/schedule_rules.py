"""Rules of the stages of the schedule."""

from __future__ import annotations

import re
from collections.abc import Iterator

from w1train.config.errors import Problem, show
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config

_STAGE_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-]+")


def _stages_rule(config: Config) -> Iterator[Problem]:
    stages = config.schedule.stages
    if not stages:
        yield Problem("schedule.stages", "{}", "at least one stage", "schedule.stages.NAME={tokens: 1e9, learning_rate: 3e-4}")
    for name, stage in stages.items():
        if not _STAGE_NAME_PATTERN.fullmatch(name):
            yield Problem(f"schedule.stages.{name}", f"the name {show(name)}", "a name of letters, digits, '_' and '-'")
        if 0 < stage.tokens < stage.rewarm_tokens:
            valid = f"at most the stage's {stage.tokens} tokens"
            yield Problem(f"schedule.stages.{name}.rewarm_tokens", show(stage.rewarm_tokens), valid)


SCHEDULE_RULES: tuple[Rule, ...] = (_stages_rule,)
