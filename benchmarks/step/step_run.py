"""A run of benchmarks.step: what it trains, and what it measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Variant = Literal["recipe", "flex", "unfused", "kernels off"]


@dataclass(slots=True)
class Run:
    """A run in a process of its own: what it trains, and what it measured."""

    streams: int
    variant: Variant
    layers: int
    largest: bool = False
    """This flag tells whether the run has as many layers as fit."""
    found: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    """The reason why it measured nothing."""
    failed: bool = False
    """This flag tells whether the run should have measured something, and did not."""

    @property
    def name(self) -> str:
        """Name of the run in tables and results."""
        return f"{self.streams} stream{'s' if self.streams > 1 else ''}, {self.variant}, {self.layers} layers"
