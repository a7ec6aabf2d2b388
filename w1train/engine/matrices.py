"""The matrices that Muon updates: their names, the logical matrices in a fused parameter, and the rank that orthogonalizes each of them.

Training and the planner must agree on all of this, so the module imports neither torch nor megatron-core.

The matrices are the weights of the linear maps inside the layers, and those of each expert. AdamW updates everything else. Embedding and
head have a row for each token, most of which have no gradient in a step, and vectors (norms, biases) have no singular values (arXiv
2502.16982, section 2.2). The timestep embedding and the modulations are AdamW's by our choice: their inputs are a few timesteps, so their
gradients have a low rank, and the orthogonalization would raise the noise in all other directions to the size of the signal. The router is
AdamW's by our choice too: like the head it has a row for each class, and experts that get few tokens have rows of small gradients.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from w1train.config.schema import ModelConfig

_QKV, _PROJECTION = "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"
_GATE_AND_UP, _DOWN = "linear_fc1.weight", "linear_fc2.weight"
_EXPERTS = "mlp.experts."
_MATRICES = (_QKV, _PROJECTION, *(part + linear for part in ("mlp.", "mlp.shared_experts.", _EXPERTS) for linear in (_GATE_AND_UP, _DOWN)))
NUM_ITERATIONS = 5
"""Steps of the Newton-Schulz iteration, as in the published algorithm."""


def is_matrix(name: str) -> bool:
    """Tell whether Muon updates the parameter of this name, which is its name in the whole model."""
    return name.startswith("decoder.layers.") and name.endswith(_MATRICES)


def stack(name: str, shape: Sequence[int]) -> tuple[int, tuple[int, int]]:
    """Return the number of matrices in a parameter, one for each expert that the rank has, and the shape of each."""
    number = shape[0] if _EXPERTS in name else 1
    return number, (math.prod(shape[:-1]) // number, shape[-1])


class Fusion(NamedTuple):
    """The logical matrices in one parameter, or in one expert's part of it, as a tensor-parallel rank holds it.

    Its rows are ``num_groups`` groups, each of which has ``sizes[i]`` rows of matrix i, for every i in turn.
    """

    num_groups: int
    sizes: tuple[int, ...]
    partition_dim: int
    """The dimension over which each logical matrix is split."""


def fusion(name: str, num_rows: int, model: ModelConfig) -> Fusion:
    """Return the logical matrices of a parameter.

    Args:
        num_rows: rows on one tensor-parallel rank.
    """
    if name.endswith(_QKV):
        channels = model.kv_channels or model.hidden_size // model.num_attention_heads
        query = model.num_attention_heads // (model.num_query_groups or model.num_attention_heads) * channels
        return Fusion(num_rows // (query + 2 * channels), (query, channels, channels), 0)
    if name.endswith(_GATE_AND_UP):
        return Fusion(1, (num_rows // 2, num_rows // 2), 0)
    return Fusion(1, (num_rows,), 1)


def logical_shapes(parts: Fusion, shape: tuple[int, int], num_tensor: int) -> list[tuple[int, int]]:
    """Return the whole shapes of the logical matrices of a parameter, whose shape on each of ``num_tensor`` ranks is given."""
    rows, columns = (num_tensor, 1) if parts.partition_dim == 0 else (1, num_tensor)
    return [(parts.num_groups * size * rows, shape[1] * columns) for size in parts.sizes]


def iteration_flops(shape: tuple[int, int]) -> int:
    """Return the FLOPs of the orthogonalization of a matrix: in each step two products with the short side squared and the long side, and
    the square of the Gram matrix."""
    short, long = min(shape), max(shape)
    return NUM_ITERATIONS * (4 * short * short * long + 2 * short**3)


Range = tuple[int, int]
"""First element and end; equal if there is no element."""


def shared_ranges(start: int, end: int, bucket_start: int, share: int, num_shares: int) -> list[Range]:
    """Return the elements of a parameter that each data-parallel rank updates, counted from the parameter's first element.

    Args:
        start, end: the parameter's place in the flat buffer.
        bucket_start, share, num_shares: the bucket that has the parameter is divided into shares of this size.
    """
    lows = (bucket_start + number * share for number in range(num_shares))
    bounds = ((min(max(low, start), end), min(max(low + share, start), end)) for low in lows)
    return [(low - start, high - start) for low, high in bounds]


def part_of_ranges(ranges: Sequence[Range], number: int, size: int) -> list[Range]:
    """Return the parts of the ranges that are in the matrix ``number`` of a stack, counted from this matrix's first element.

    Args:
        size: elements of a matrix.
    """
    start = number * size
    return [(min(max(low - start, 0), size), min(max(high - start, 0), size)) for low, high in ranges]


def owners(ranges: Sequence[Sequence[Range]], flops: Sequence[int], num_tensor: int) -> list[int]:
    """Return the place of the rank that orthogonalizes each matrix: a rank that holds the most elements of the matrix, and of these ranks
    the rank that has the least work from the matrices before.

    A place is the data-parallel rank times ``num_tensor`` plus the tensor-parallel rank.

    Args:
        ranges: of each matrix, the range of each data-parallel rank, which is the same on all tensor-parallel ranks.
        flops: the work of each matrix.
    """
    work: dict[int, int] = defaultdict(int)
    chosen = []
    for of_ranks, cost in zip(ranges, flops, strict=True):
        most = max(end - start for start, end in of_ranks)
        holders = [rank for rank, (start, end) in enumerate(of_ranks) if end - start == most]
        places = [rank * num_tensor + tensor for rank in holders for tensor in range(num_tensor)]
        place = min(places, key=work.__getitem__)  # the first of equal ranks
        work[place] += cost
        chosen.append(place)
    return chosen


def rounds(places: Sequence[int]) -> list[list[int]]:
    """Return the numbers of the matrices that are exchanged together, at most one matrix of each owner, so that a rank never has more than
    one whole matrix in memory."""
    by_owner: dict[int, list[int]] = defaultdict(list)
    for number, place in enumerate(places):
        by_owner[place].append(number)
    return [[number for number in turn if number is not None] for turn in itertools.zip_longest(*by_owner.values())]
