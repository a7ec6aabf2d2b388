"""The sizes of the buckets in which gradients are reduced. Training and the planner must agree on them, because the padding between buckets
is memory."""

from __future__ import annotations

# megatron-core's own values. Smaller messages would spend more time on latency than on bandwidth.
MIN_BUCKET_SIZE = 40_000_000
MIN_BUCKET_SIZE_PER_RANK = 1_000_000


def bucket_size(num_ranks: int, pipeline_rank: int, *, overlap_grad_reduce: bool) -> int | None:
    """Return the number of elements after which a bucket ends, or None where one bucket has all gradients.

    There is one bucket without overlap, and on the later pipeline stages, whose reduction is over before the first stage's begins.

    Args:
        num_ranks: data- and context-parallel ranks. Buckets grow with them, because each rank sends its share of a bucket.
    """
    if not overlap_grad_reduce or pipeline_rank > 0:
        return None
    return max(MIN_BUCKET_SIZE, MIN_BUCKET_SIZE_PER_RANK * num_ranks)
