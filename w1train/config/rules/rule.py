"""The type of a rule: a function from a configuration to the problems that it finds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

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


class StageRule:
    """A rule that holds for the run, and for each stage that sets fields of diffusion itself.

    A problem that the run and a stage share is reported once, at the run's key.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        functools.update_wrapper(self, rule)

    def __call__(self, config: Config, stages: Iterable[tuple[str, Config]] | None = None) -> Iterator[Problem]:
        """Yield the problems of the configuration.

        Args:
            stages: ``own_stages`` of the configuration, if they are known already.
        """
        of_run = list(self._rule(config))
        yield from of_run
        for name, at_this_stage in own_stages(config) if stages is None else stages:
            own = config.schedule.stages[name].diffusion
            for problem in self._rule(at_this_stage):
                field = problem.key.removeprefix("diffusion.")
                key = f"schedule.stages.{name}.diffusion.{field}" if field in own else f"{problem.key} in stage {name}"
                if problem not in of_run:
                    yield dataclasses.replace(problem, key=key)


def own_stages(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield the name and the configuration of each stage that sets fields of diffusion itself."""
    for name, stage in config.schedule.stages.items():
        if stage.diffusion:
            yield name, at_stage(config, name)


def at_every_stage(rule: Rule) -> StageRule:
    """Return the rule for the run and for each of its stages."""
    return StageRule(rule)
