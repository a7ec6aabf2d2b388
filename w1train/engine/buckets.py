"""How large the buckets are in which gradients are reduced: training and the planner must agree, for what is between buckets is memory."""

from __future__ import annotations

# megatron-core's own choice, below which messages are bound by latency.
MIN_BUCKET_SIZE = 40_000_000
MIN_BUCKET_SIZE_PER_RANK = 1_000_000


def bucket_size(num_ranks: int, pipeline_rank: int, *, overlap_grad_reduce: bool) -> int | None:
    """Elements after which a bucket ends; None = one bucket has all.

    So it is without overlap, and on the later pipeline stages, whose reduction is over before the first stage's begins. More for many
    ranks (data- and context-parallel ones): their messages get small.
    """
    if not overlap_grad_reduce or pipeline_rank > 0:
        return None
    return max(MIN_BUCKET_SIZE, MIN_BUCKET_SIZE_PER_RANK * num_ranks)
