"""The random numbers of sampling. Each row of a batch has its own generator, so that no text depends on the other texts of its batch, and
every tensor-parallel rank draws the same numbers. All numbers are float64 with 53 random bits: with 24 bits a rare token is drawn too
rarely, as if the temperature were lower (arXiv 2409.02908).

Shapes: b = rows of a batch, n = positions of all rows together, v = vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def row_generators(seed: int, rows: Sequence[int], device: torch.device | str, purpose: str = "") -> list[torch.Generator]:
    """Return a generator for each row.

    Args:
        rows: the place of each row's prompt among all prompts.
        purpose: a name; two uses of random numbers in the same row need two names.
    """
    return [_row_generator(f"{seed}:{row}{purpose}", torch.device(device)) for row in rows]


def draw(probabilities: Tensor, counts: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Return an id for each row of probabilities, int64 [n].

    The id with the largest probability / E has this probability if the E are exponential: this is the Gumbel-max trick without logarithms.

    Args:
        probabilities: float64 [n, v]. They need not add up to 1.
        counts: how many of the n positions each row has, in order.
    """
    numbers = torch.empty_like(probabilities)
    for part, generator in zip(numbers.split(list(counts)), generators, strict=True):
        part.exponential_(generator=generator)
    # A number is 0 once in 2^53 draws, and 0 / 0 would be the largest.
    return (probabilities / numbers.clamp_min_(torch.finfo(torch.float64).tiny)).argmax(dim=1)


def _row_generator(key: str, device: torch.device) -> torch.Generator:
    """Return the generator of a row. Its seed is a hash, because the CPU generator keeps 32 bits of it and seed + row would collide."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
