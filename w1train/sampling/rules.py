"""The registration of the rules of a denoising step: which predictions are kept first, and how many of them."""

from __future__ import annotations

from collections.abc import Callable

from w1train.config.schema_sampling import SamplingConfig
from w1train.sampling.counts import Count, Schedule, Threshold
from w1train.sampling.orders import Order, low_confidence, random_order

ORDERS: dict[str, Order] = {
    "low_confidence": Order(low_confidence, are_log_probabilities=True),
    "random": Order(random_order),
}
"""The order of each value of sampling.remasking."""

COUNTS: tuple[Callable[[SamplingConfig], Count | None], ...] = (
    lambda config: None if config.threshold is None else Threshold(config.threshold),
    lambda config: Schedule(),
)
"""The counts, each made from the settings; None where the settings do not ask for the count. The first that is not None applies."""


def count_of(config: SamplingConfig) -> Count:
    """Return the count that the settings ask for."""
    return next(count for make in COUNTS if (count := make(config)) is not None)
