"""Sums by name. Everything that is logged of a loss is made of sums, because only sums can be added over micro-batches and ranks: the mean
of the ranks' means is wrong if the ranks have different counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

type Layout = Mapping[str, tuple[int, ...]]
"""Name -> shape of each sum; () is a single number."""


@dataclass(slots=True, frozen=True)
class NamedSums:
    """Sums in one float64 vector, so that one all-reduce carries all of them."""

    values: Tensor
    """float64 [size_of(layout)]."""
    layout: Layout

    @classmethod
    def pack(cls, sums: Mapping[str, Tensor], layout: Layout) -> Self:
        """Return the sums in one vector, in the order of the layout, whose names must be those of ``sums``."""
        assert sums.keys() == layout.keys(), (sorted(sums), sorted(layout))
        return cls(torch.cat([sums[name].double().reshape(-1) for name in layout]), layout)

    def __getitem__(self, name: str) -> Tensor:
        """Return one sum, float64 in its shape, without waiting for a GPU."""
        return self._parts(self.values)[name]

    def numbers(self) -> dict[str, Any]:
        """Return every sum as a number, or as nested lists of numbers. This waits for a GPU."""
        return {name: part.tolist() for name, part in self._parts(self.values.cpu()).items()}

    def _parts(self, values: Tensor) -> dict[str, Tensor]:
        parts = values.split([math.prod(shape) for shape in self.layout.values()])
        return {name: part.reshape(shape) for part, (name, shape) in zip(parts, self.layout.items(), strict=True)}


def size_of(layout: Layout) -> int:
    """Return the length of the vector that holds the sums of a layout."""
    return sum(math.prod(shape) for shape in layout.values())


def scalars_first(layout: Layout) -> Layout:
    """Return the layout in the same order, except that single numbers come before arrays."""
    return dict(sorted(layout.items(), key=lambda entry: entry[1] != ()))
