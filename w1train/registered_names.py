"""The check of the names that an option takes from a table: noise processes, losses, rules of sampling, attention backends, optimizers.

The tables belong to the packages whose objects they name, and an entry there is all that makes a name valid. The schema is below these
packages in the order of imports, so it takes any text. The commands that start or plan a run check these rules beside those of the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from w1train.config.errors import Problem, unknown_name
from w1train.config.rules.rule import Rule, at_every_stage
from w1train.config.schema import Config


def _processes() -> Collection[str]:
    from w1train.diffusion.processes import PROCESSES

    return PROCESSES


def _losses() -> Collection[str]:
    from w1train.objectives.objective import LOSSES

    return LOSSES


def _orders() -> Collection[str]:
    from w1train.sampling.rules import ORDERS

    return ORDERS


def _backends() -> Collection[str]:
    from w1train.attention.backends.choice import BACKENDS

    return ["auto", *BACKENDS]


def _optimizers() -> Collection[str]:
    from w1train.runtime.megatron_on_cpu import import_megatron

    import_megatron()
    from w1train.engine.optimizers import OPTIMIZERS

    return OPTIMIZERS


def _name_rule(section: str, field: str, names: Callable[[], Collection[str]], *usual: str) -> Rule:
    """Return the rule of an option.

    Args:
        names: returns the table. Its import takes seconds.
        usual: names that are known to be in the table, so that most runs do not wait for the import. A new name need not be among them.
    """

    def rule(config: Config) -> Iterator[Problem]:
        name = getattr(getattr(config, section), field)
        if name not in usual and name not in (valid := names()):
            yield unknown_name(f"{section}.{field}", name, valid)

    return rule


NAME_RULES: tuple[Rule, ...] = (
    at_every_stage(_name_rule("diffusion", "objective", _processes, "diffusion", "autoregressive")),
    at_every_stage(_name_rule("diffusion", "loss", _losses, "cross_entropy")),
    _name_rule("sampling", "remasking", _orders, "low_confidence", "random"),
    _name_rule("attention", "backend", _backends, "auto", "cudnn", "flex", "te", "sdpa", "reference"),
    _name_rule("optimizer", "name", _optimizers, "adamw"),
)
"""A rule for each option whose values are names in a table."""
