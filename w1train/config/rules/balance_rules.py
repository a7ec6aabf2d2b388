"""Rules of the balance of experts."""

from __future__ import annotations

from collections.abc import Iterator

from w1train.config.errors import Problem, show
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config
from w1train.config.schema_model import BalanceConfig


def _losses_rule(config: Config) -> Iterator[Problem]:
    """Report losses of routers that a dense model does not have."""
    if config.model.experts.num_experts > 0:
        return
    for name in ("auxiliary", "router_z"):
        if (found := getattr(config.balance, name)) > 0:
            valid = "0 with model.experts.num_experts=0: a dense model has no router"
            yield Problem(f"balance.{name}", show(found), valid, f"balance.{name}=0")


def _bias_rule(config: Config) -> Iterator[Problem]:
    """Report settings of a bias that the model does not have. The default of the rate is no mistake."""
    if config.model.experts.num_experts > 0 and config.model.experts.has_bias:
        return
    default, needs = BalanceConfig(), "a model with model.experts.has_bias=true, which has the bias that this moves"
    if config.balance.bias_rate not in (0, default.bias_rate):
        valid = f"{show(default.bias_rate)} (the default) or 0; other values are for {needs}"
        yield Problem("balance.bias_rate", show(config.balance.bias_rate), valid, f"balance.bias_rate={show(default.bias_rate)}")
    if config.balance.zero_mean:
        yield Problem("balance.zero_mean", "true", f"false; true is for {needs}", "balance.zero_mean=false")


BALANCE_RULES: tuple[Rule, ...] = (_losses_rule, _bias_rule)
