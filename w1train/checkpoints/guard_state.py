"""Checks of the state of the guard of the steps in a manifest, which a stranger may have written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from w1train.config.reading import shorten

WATCHED = ("masked_cross_entropy", "grad_norm")
"""Metrics in which the guard of the steps looks for spikes (w1train/training/health/spikes.py)."""
_LARGEST = 1e100
"""The largest value whose square, and the sum of many squares, stays finite. Values that a step computes in float32 are far smaller."""


def is_watchable(value: object) -> bool:
    """Tell whether a window may hold a value. The standard deviation of such values is finite."""
    return type(value) in (int, float) and abs(value) <= _LARGEST  # type: ignore[arg-type]


def state_problems(health: Any) -> Iterator[str]:
    """Describe the values that the guard of the steps cannot use, in words that follow "the manifest says"."""
    if not isinstance(health, dict):
        yield f"health: {shorten(health)}"
        return
    for name in ("skipped", "in_a_row"):
        if name in health and not (type(health[name]) is int and 0 <= health[name] < 1 << 62):
            yield f"health.{name}: {shorten(health[name])}, which is not a number of steps"
    window = health.get("window", {})
    if not isinstance(window, dict):
        yield f"health.window: {shorten(window)}, which is not a JSON object"
    elif "stage" in window:  # a window without a stage is empty, whatever else is in it
        yield from _window_problems(window)


def _window_problems(window: dict[str, Any]) -> Iterator[str]:
    if not isinstance(window["stage"], str):
        yield f"health.window.stage: {shorten(window['stage'])}, which is not a text"
    for name in WATCHED:
        values = window.get(name)
        if not isinstance(values, list):
            yield f"health.window.{name}: {shorten(values)}, which is not a list"
        elif (wrong := next((value for value in values if not is_watchable(value)), values)) is not values:
            yield f"health.window.{name} holds {shorten(wrong)}, which is not a finite number"
