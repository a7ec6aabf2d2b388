"""The settings of sampling that a user gives, in the place of those of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from w1train.config.schema_sampling import SamplingConfig


def with_given(sampling: SamplingConfig, given: Mapping[str, Any]) -> SamplingConfig:
    """Return the run's settings with those that are given.

    Args:
        given: values by the name of their field; None = the run's value. A ``threshold`` or a ``block_size`` of 0 takes the run's value
            away: sampling then has no threshold, or blocks as in training. So does an empty ``chat_template``: prompts are then continued.
    """
    sampling = replace(sampling, **{name: value for name, value in given.items() if value is not None})
    return replace(
        sampling,
        threshold=sampling.threshold or None,
        block_size=sampling.block_size or None,
        chat_template=sampling.chat_template or None,
    )
