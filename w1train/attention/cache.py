"""Keys and values of finished tokens, kept between the forward passes of generation.

In block diffusion a clean token sees only clean tokens of its own and earlier blocks. The keys and values of a finished block are therefore
final, and a noisy block needs nothing else of what precedes it. In masked diffusion every token sees every other token: each token that is
unmasked changes all keys, so no key can be kept.

Shapes: n = rows of a forward pass (padding of sequence parallelism included), b = samples, g = key/value heads of this rank,
d = channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from w1train.attention.visibility import Visibility

Causality = Literal["block", "token"]
"""What a token sees of its own block: all of it, or the tokens up to itself."""


class KeyValueCache:
    """Keys and values of the kept tokens, for all layers of this rank."""

    def __init__(self, capacity: int) -> None:
        """
        Args:
            capacity: the largest sum of the number of kept tokens and the number of rows of a pass.
        """
        self.capacity, self.num_tokens = capacity, 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a pass, [n, b, g, d], after the kept keys and values; return all of them, [num_tokens + n, b, g, d].

        Those of the pass stay in the cache if ``keep`` is called next; otherwise the next pass overwrites them. A pass may therefore be
        repeated, as virtual pipeline stages do, and a denoising step copies only its own rows.
        """
        end = self.num_tokens + len(key)
        assert end <= self.capacity, (end, self.capacity)
        if layer_number not in self._layers:
            self._layers[layer_number] = tuple(tensor.new_empty((self.capacity, *tensor.shape[1:])) for tensor in (key, value))
        keys, values = self._layers[layer_number]
        keys[self.num_tokens : end], values[self.num_tokens : end] = key, value
        return keys[:end], values[:end]

    def keep(self, num_tokens: int) -> None:
        """Make the first rows of the last pass part of the cache. It is called once, after all layers."""
        self.num_tokens += num_tokens

    def select_samples(self, samples: Tensor) -> None:
        """Keep some samples of the batch, int64 [new b]; the others have ended."""
        for layer_number, (keys, values) in self._layers.items():
            self._layers[layer_number] = keys.index_select(1, samples), values.index_select(1, samples)


def cached_visibility(
    num_cached: int, num_tokens: int, block_size: int, causality: Causality, *, num_rows: int, device: torch.device | str
) -> Visibility:
    """Return what new tokens of a document see of [cached ; new] keys: everything before them, and their own block as ``causality`` says.

    The visibility is the same for clean tokens and for a noisy block: only the contents of the cache differ. Blocks are counted from the
    start of the document.

    Args:
        num_rows: rows of the pass. Rows from ``num_tokens`` on are padding, which sees nothing and which no token sees.

    Returns:
        The visibility of one sample (b = 1), which is the same for all samples.
    """
    position = num_cached + torch.arange(num_rows, device=device, dtype=torch.int32)
    unit = block_size if causality == "block" else 1
    end = (position - position % unit + unit).clamp_max(num_cached + num_tokens)
    end = torch.where(position < num_cached + num_tokens, end, 0)
    return Visibility(end[None, None], num_cached + num_rows)
