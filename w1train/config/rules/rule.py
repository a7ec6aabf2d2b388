"""The type of a rule: a function from a configuration to the problems that it finds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

from w1train.config.errors import Problem
from w1train.config.schema import Config
from w1train.config.stages import at_stage

Rule = Callable[[Config], Iterator[Problem]]


def at_every_stage(rule: Rule) -> Rule:
    """Return the rule for the run and for each stage that sets fields of diffusion itself.

    A problem that the run and a stage share is reported once, at the run's key.
    """

    @functools.wraps(rule)
    def everywhere(config: Config) -> Iterator[Problem]:
        of_run = list(rule(config))
        yield from of_run
        for name, stage in config.schedule.stages.items():
            if not stage.diffusion:
                continue
            for problem in rule(at_stage(config, name)):
                field = problem.key.removeprefix("diffusion.")
                key = f"schedule.stages.{name}.diffusion.{field}" if field in stage.diffusion else f"{problem.key} in stage {name}"
                if problem not in of_run:
                    yield dataclasses.replace(problem, key=key)

    return everywhere
