"""Seconds of the products with the matrices of routed experts, which are many small products.

torch's grouped product (aten/src/ATen/native/cuda/GroupMM.cu) divides the rows of each expert into tiles of 64 rows if experts have at most
128 rows in the mean, and else of 128 rows. An expert's last tile is filled up with rows that nothing needs, on average with half a tile.
The matrices of all experts of a rank are read for each product, however few rows there are. Therefore a rank that has all experts, and few
rows for each, is slow although it sends no row.
"""

from __future__ import annotations

from w1train.planning.activations import Sizes
from w1train.planning.assumptions import Assumptions, Device
from w1train.planning.expert_activations import ExpertSizes
from w1train.planning.layout import Chunk, Layout

_SMALL_TILE, _LARGE_TILE = 64, 128
_MOST_ROWS_OF_SMALL_TILES = 128


def expert_seconds(flops: int, sizes: Sizes, layout: Layout, chunk: Chunk, device: Device, assumptions: Assumptions) -> float:
    """Return the seconds of the products of one micro-batch in one chunk, on the rank whose experts have the most rows. The time is that of
    the arithmetic, or that of the matrices' way from and to memory if it is longer.

    Args:
        flops: those of the routed experts, forward and backward, for the mean number of rows.
    """
    experts = sizes.experts
    if experts is None or not chunk.num_expert_layers:
        return 0.0
    passes = 4 if layout.repeats_experts else 3
    computed = flops * passes / 3 * min(assumptions.expert_imbalance, layout.expert) * tile_factor(experts)
    arithmetic = computed / (device.peak_tflops * 1e12 * assumptions.expert_matmul_efficiency)
    # The forward pass and the gradient of the input read the matrices, and the gradient of the matrices is written.
    moved = passes * chunk.num_expert_layers * experts.num_local * 3 * experts.hidden * experts.inner * experts.element
    return max(arithmetic, moved / (device.memory_gb_per_second * 1e9 * assumptions.memory_efficiency))


def tile_factor(experts: ExpertSizes) -> float:
    """Return the rows that the tiles of all experts have, divided by the rows that are needed. An expert has a tile at least."""
    rows = experts.rows_per_expert
    tile = _SMALL_TILE if rows <= _MOST_ROWS_OF_SMALL_TILES else _LARGE_TILE
    return max(tile, rows + tile / 2) / rows
