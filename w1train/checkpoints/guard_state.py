"""Checks of the guard's state as a manifest has it: a checkpoint may come from anybody."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from w1train.config.reading import shorten

WATCHED = ("masked_cross_entropy", "grad_norm")
"""Metrics whose spikes the guard of the steps looks for (w1train/training/health/spikes.py)."""
_LARGEST = 1e100
"""The square of a value, and a sum of squares, stay finite; what a step computes in float32 is below it by far."""


def is_watchable(value: object) -> bool:
    """Tell whether a window may hold a value: the deviation of values that it holds is a finite number."""
    return type(value) in (int, float) and abs(value) <= _LARGEST  # type: ignore[arg-type]


def state_problems(health: Any) -> Iterator[str]:
    """Say what the guard of the steps could not go on with, in words that follow "the manifest says"."""
    if not isinstance(health, dict):
        yield f"health: {shorten(health)}"
        return
    for name in ("skipped", "in_a_row"):
        if name in health and not (type(health[name]) is int and 0 <= health[name] < 1 << 62):
            yield f"health.{name}: {shorten(health[name])}, which is no number of steps"
    window = health.get("window", {})
    if not isinstance(window, dict):
        yield f"health.window: {shorten(window)}, which is no JSON object"
    elif "stage" in window:  # A window without a stage is empty, whatever else is in it.
        yield from _window_problems(window)


def _window_problems(window: dict[str, Any]) -> Iterator[str]:
    if not isinstance(window["stage"], str):
        yield f"health.window.stage: {shorten(window['stage'])}, which is no text"
    for name in WATCHED:
        values = window.get(name)
        if not isinstance(values, list):
            yield f"health.window.{name}: {shorten(values)}, which is no list"
        elif (wrong := next((value for value in values if not is_watchable(value)), values)) is not values:
            yield f"health.window.{name} holds {shorten(wrong)}, which is no finite number"
