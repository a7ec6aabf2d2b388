"""The list of the checks before a start, as rules beside those of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from w1train.config.errors import Problem
from w1train.config.rules.parallel_rules import world_size_problems
from w1train.config.rules.rule import Rule, at_every_stage
from w1train.config.schema import Config
from w1train.preflight.disks import directories_rule, space_rule
from w1train.preflight.input_files import counts_rule, files_rule
from w1train.preflight.start_weights import weights_rule
from w1train.preflight.visible_gpus import device_rule


def run_rules(num_ranks: int | None, ranks_here: int | None, max_steps: int | None = None) -> tuple[Rule, ...]:
    """Return the rules of a run that is about to start, for ``parse_command_line``.

    Args:
        num_ranks: the number of ranks of the run; None = not known.
        ranks_here: the number of its ranks on this machine; None = this machine is not checked, because the run is on other machines too,
            or on other machines only.
        max_steps: the step at which the run ends this time; None = the last step of the schedule.
    """
    of_world = _world_rule(num_ranks)
    return (of_world,) if ranks_here is None else (of_world, *_machine_rules(max_steps), device_rule(ranks_here))


def machine_problems(config: Config, max_steps: int | None = None) -> list[Problem]:
    """Return what this machine lacks for the run of a valid configuration; ``max_steps`` is that of :func:`run_rules`."""
    return [problem for rule in _machine_rules(max_steps) for problem in rule(config)]


def _machine_rules(max_steps: int | None) -> tuple[Rule, ...]:
    return (files_rule, at_every_stage(counts_rule), weights_rule, directories_rule, partial(space_rule, max_steps=max_steps))


def _world_rule(num_ranks: int | None) -> Rule:
    def rule(config: Config) -> Iterator[Problem]:
        yield from world_size_problems(config, num_ranks)

    return rule
