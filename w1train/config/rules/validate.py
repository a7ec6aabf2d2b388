"""Validation of a whole configuration: every rule is checked, and no problem stops the search for others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from w1train.config.errors import Problem
from w1train.config.from_tree import Conversion
from w1train.config.rules.adapter_rules import ADAPTER_RULES
from w1train.config.rules.attention_rules import ATTENTION_RULES
from w1train.config.rules.balance_rules import BALANCE_RULES
from w1train.config.rules.checkpoint_rules import CHECKPOINT_RULES
from w1train.config.rules.data_rules import DATA_RULES
from w1train.config.rules.diffusion_rules import DIFFUSION_RULES
from w1train.config.rules.expert_rules import EXPERT_RULES
from w1train.config.rules.health_rules import HEALTH_RULES
from w1train.config.rules.learned_rates_rules import LEARNED_RATES_RULES
from w1train.config.rules.model_rules import MODEL_RULES
from w1train.config.rules.parallel_rules import PARALLEL_RULES, world_size_problems
from w1train.config.rules.preference_rules import PREFERENCE_RULES
from w1train.config.rules.rule import Rule, StageRule, own_stages
from w1train.config.rules.run_rules import RUN_RULES
from w1train.config.rules.sampling_rules import SAMPLING_RULES
from w1train.config.rules.schedule_rules import SCHEDULE_RULES
from w1train.config.rules.speed_rules import SPEED_RULES
from w1train.config.rules.validation_rules import VALIDATION_RULES
from w1train.config.rules.value_rules import VALUE_RULES
from w1train.config.schema import Config

RULES: tuple[Rule, ...] = (
    *VALUE_RULES,
    *RUN_RULES,
    *MODEL_RULES,
    *EXPERT_RULES,
    *BALANCE_RULES,
    *ADAPTER_RULES,
    *DATA_RULES,
    *DIFFUSION_RULES,
    *LEARNED_RATES_RULES,
    *PREFERENCE_RULES,
    *SCHEDULE_RULES,
    *VALIDATION_RULES,
    *SAMPLING_RULES,
    *CHECKPOINT_RULES,
    *PARALLEL_RULES,
    *ATTENTION_RULES,
    *SPEED_RULES,
    *HEALTH_RULES,
)
"""All rules, in the order in which their problems are reported. A new rule goes into the list of its subject's file."""


def validate(config: Config, world_size: int | None = None) -> list[Problem]:
    """Return every problem of a configuration; with ``world_size`` (ranks) the layout over ranks is checked too."""
    # A schedule may have many stages, and every rule of stages would make their configurations again.
    stages = list(own_stages(config))
    found = (rule(config, stages) if isinstance(rule, StageRule) else rule(config) for rule in RULES)
    return [problem for problems in found for problem in problems] + list(world_size_problems(config, world_size))


def validate_conversion(conversion: Conversion, more_rules: Sequence[Rule] = ()) -> list[Problem]:
    """Return the problems of a configuration some of whose fields may be unset: a rule that reads an unset field ends there."""
    if conversion.complete:
        return validate(conversion.config) + [problem for rule in more_rules for problem in rule(conversion.config)]
    return [problem for rule in (*RULES, *more_rules) for problem in _until_unset(rule(conversion.config))]


def _until_unset(problems: Iterator[Problem]) -> Iterator[Problem]:
    try:
        yield from problems
    except AttributeError as error:
        # Only a schema field that conversion left unset may end a rule; anything else is a mistake in the rule.
        if not (dataclasses.is_dataclass(error.obj) and error.name in {field.name for field in dataclasses.fields(error.obj)}):
            raise
