"""Keys and values of finished tokens, kept between the forward passes of generation.

In block diffusion a clean token sees clean tokens of its own and earlier blocks alone, so the keys and values of a finished block
are final, and a noisy block needs nothing else of the past. In masked diffusion every token sees every other: each token that is
unmasked changes all keys, and there is nothing to keep.

Shapes: n = rows of a forward pass (padding of sequence parallelism included), b = samples, g = key/value heads of this rank,
d = channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from w1train.attention.visibility import Visibility

Causality = Literal["block", "token"]
"""How far a token sees inside its own block: all of it, or up to itself."""


class KeyValueCache:
    """Keys and values of the kept tokens, for all layers of this rank."""

    def __init__(self, capacity: int) -> None:
        """capacity: kept tokens and rows of the last pass together, at most."""
        self.capacity, self.num_tokens = capacity, 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Lay a pass's keys and values [n, b, g, d] behind the kept ones; both together, [num_tokens + n, b, g, d].

        They stay if ``keep`` follows, otherwise the next pass overwrites them. So a pass may be repeated, as virtual pipeline
        stages do, and a denoising step copies nothing but its own rows.
        """
        end = self.num_tokens + len(key)
        assert end <= self.capacity, (end, self.capacity)
        if layer_number not in self._layers:
            self._layers[layer_number] = tuple(tensor.new_empty((self.capacity, *tensor.shape[1:])) for tensor in (key, value))
        keys, values = self._layers[layer_number]
        keys[self.num_tokens : end], values[self.num_tokens : end] = key, value
        return keys[:end], values[:end]

    def keep(self, num_tokens: int) -> None:
        """Make the first rows of the last pass part of the cache; called once, after all layers."""
        self.num_tokens += num_tokens

    def select_samples(self, samples: Tensor) -> None:
        """Go on with some samples of the batch, int64 [new b]."""
        for layer_number, (keys, values) in self._layers.items():
            self._layers[layer_number] = keys.index_select(1, samples), values.index_select(1, samples)


def cached_visibility(
    num_cached: int, num_tokens: int, block_size: int, causality: Causality, *, num_rows: int, device: torch.device | str
) -> Visibility:
    """What new tokens of a document see of [cached ; new] keys: everything before them, and their own block as ``causality`` says.

    Clean tokens and a noisy block alike: only what lies in the cache differs. Blocks are counted from the document's start.

    Args:
        num_rows: rows of the pass; those from ``num_tokens`` on are padding, which sees nothing and is seen by nothing.

    Returns:
        For one sample (b = 1), the same for all.
    """
    position = num_cached + torch.arange(num_rows, device=device, dtype=torch.int32)
    unit = block_size if causality == "block" else 1
    end = (position - position % unit + unit).clamp_max(num_cached + num_tokens)
    end = torch.where(position < num_cached + num_tokens, end, 0)
    return Visibility(end[None, None], num_cached + num_rows)
