"""The type of a rule: a function from a configuration to the problems that it finds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

from w1train.config.errors import Problem
from w1train.config.schema import Config, DiffusionConfig
from w1train.config.stages import at_stage

Rule = Callable[[Config], Iterator[Problem]]
ProcessRule = Callable[[Config, bool], Iterator[Problem]]
"""A rule that depends on the noise process. It gets whether the process is causal."""

OWN_PROCESSES = {
    "diffusion": False,
    "autoregressive": True,
    **dict.fromkeys(("uniform", "hybrid", "log_snr", "per_id_masked", "edits", "token_to_token", "learned_masked"), False),
}
"""The noise processes that come with w1train, and whether they are causal. Each process has is_causal, but the configuration does not
import the processes. w1train.registered_names checks a ProcessRule for all other processes."""


def is_causal_here(diffusion: DiffusionConfig) -> bool:
    """Return whether the process is causal. A process that does not come with w1train counts as causal, for which fewer rules hold."""
    return OWN_PROCESSES.get(diffusion.objective, True)


def of_own_processes(rule: ProcessRule) -> Rule:
    """Return the rule as far as the configuration knows the process."""

    @functools.wraps(rule)
    def checked(config: Config) -> Iterator[Problem]:
        return rule(config, is_causal_here(config.diffusion))

    return checked


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
