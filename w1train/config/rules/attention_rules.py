"""The rule of the attention backend."""

from __future__ import annotations

from collections.abc import Iterator

from w1train.config.errors import Problem
from w1train.config.rules.attention_limits import attention_case, limit
from w1train.config.rules.rule import Rule, at_every_stage, of_own_processes
from w1train.config.schema import Config


def attention_rule(config: Config, is_causal: bool) -> Iterator[Problem]:
    """Report a backend that cannot serve the run on any machine. What this machine lacks is found when the run starts."""
    backend = config.attention.backend
    if backend == "auto":
        return
    reason = limit(backend, attention_case(config, is_causal))
    if reason is not None:
        yield Problem(
            "attention.backend",
            backend,
            f"auto, or a backend that can serve this run; {backend} cannot: {reason}",
            "attention.backend=auto",
        )


ATTENTION_RULES: tuple[Rule, ...] = (at_every_stage(of_own_processes(attention_rule)),)
