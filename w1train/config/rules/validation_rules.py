"""Rules of validation: its timesteps and its block sizes."""

from __future__ import annotations

from collections.abc import Iterator

from w1train.config.errors import Problem, show
from w1train.config.rules.divisibility import does_not_divide
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config

_MIDPOINT_TOLERANCE = 1e-6


def _validation_rule(config: Config) -> Iterator[Problem]:
    if not config.validation.timesteps:
        yield Problem("validation.timesteps", "[]", "at least one t, 0 < t <= 1", "remove the key: the default is ten midpoints")
        return
    # The ELBO is the plain mean over the timesteps, which is a quadrature only at these midpoints.
    timesteps = config.validation.timesteps
    midpoints = [(index + 0.5) / len(timesteps) for index in range(len(timesteps))]
    if not all(abs(t - midpoint) <= _MIDPOINT_TOLERANCE for t, midpoint in zip(sorted(timesteps), midpoints, strict=True)):
        valid = f"the midpoints of {len(timesteps)} equal bins of (0, 1], in any order: their mean is the ELBO"
        yield Problem("validation.timesteps", show(timesteps), valid, show([round(midpoint, 8) for midpoint in midpoints]))


def _validation_blocks_rule(config: Config) -> Iterator[Problem]:
    length = config.data.sequence_length
    for index, size in enumerate(config.validation.block_sizes):
        if size != length and (size > length or does_not_divide(size, length)):
            yield Problem(f"validation.block_sizes[{index}]", show(size), f"a divisor of data.sequence_length ({length})")


VALIDATION_RULES: tuple[Rule, ...] = (_validation_rule, _validation_blocks_rule)
