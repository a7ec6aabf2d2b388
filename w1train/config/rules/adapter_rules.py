"""Rules of low-rank adapters (the section adapters)."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

from w1train.config.errors import Problem, listing, show
from w1train.config.rules.learned_rates_rules import LEARNED
from w1train.config.rules.rule import Rule, at_every_stage
from w1train.config.schema import Config
from w1train.config.schema_adapters import is_trained, linear_names


def _modules_rule(config: Config) -> Iterator[Problem]:
    adapters, names = config.adapters, linear_names(config.model)
    if not adapters.rank:
        return
    if not adapters.modules:
        yield Problem("adapters.modules", "[]", "at least one pattern, or adapters.rank=0", "adapters.modules=['*']")
    for pattern in adapters.modules:
        if not fnmatch.filter(names, pattern):
            routed = (
                "; routed experts, whose matrices are multiplied in groups, have no adapters" if config.model.experts.num_experts else ""
            )
            yield Problem("adapters.modules", pattern, f"patterns that fit some of {listing(names)}{routed}", "adapters.modules=['*']")


def _rank_rule(config: Config) -> Iterator[Problem]:
    adapters, hidden = config.adapters, config.model.hidden_size
    if adapters.rank > hidden > 0:
        yield Problem("adapters.rank", show(adapters.rank), f"at most model.hidden_size ({hidden}), the rank of a whole matrix")


def _optimizer_rule(config: Config) -> Iterator[Problem]:
    if config.adapters.rank and config.optimizer.name == "muon":
        valid = "adamw with adapters: Muon orthogonalizes the updates of whole matrices, which are frozen"
        yield Problem("optimizer.name", "muon", valid, "optimizer.name=adamw")


def _bias_rule(config: Config) -> Iterator[Problem]:
    experts = config.model.experts
    if config.adapters.rank and experts.num_experts and experts.has_bias and config.balance.bias_rate:
        valid = "0 with adapters: the bias that balances experts is a part of the base, which is frozen"
        yield Problem("balance.bias_rate", show(config.balance.bias_rate), valid, "balance.bias_rate=0")


def _noise_rates_rule(config: Config) -> Iterator[Problem]:
    if config.adapters.rank and config.diffusion.objective == LEARNED and not is_trained("noise_rates.unconstrained", config.adapters):
        valid = f"a list that has noise_rates.* with diffusion.objective={LEARNED}, which learns the rates"
        yield Problem("adapters.train", show(config.adapters.train), valid, "adapters.train=['noise_rates.*']")


ADAPTER_RULES: tuple[Rule, ...] = (_modules_rule, _rank_rule, _optimizer_rule, _bias_rule, at_every_stage(_noise_rates_rule))
