"""Traffic of routed tokens between the ranks of the experts.

A token's row travels to each of its experts and back, and the gradients take the same paths in the opposite direction: k (8 h + 8) bytes of
a token and layer in bf16 with a router in fp32, of which (EP - 1) / EP leave the rank.
"""

from __future__ import annotations

from collections.abc import Iterator

from w1train.planning.communication_time import Collective, Group, Traffic
from w1train.planning.expert_activations import ExpertSizes
from w1train.planning.layout import Chunk, Layout


def expert_traffic(sizes: ExpertSizes | None, layout: Layout, chunk: Chunk) -> Iterator[Traffic]:
    """Yield the traffic of routed tokens in one step. Their recomputation repeats the forward pass: rows go and come back once more."""
    backward = chunk.num_expert_layers * layout.num_micro_batches
    if sizes is None or not backward:
        return
    forward = backward * (2 if layout.repeats_experts else 1)
    if sizes.dispatcher == "all_gather":
        yield from _gathered(sizes, layout, forward, backward)
    else:
        yield from _sent(sizes, layout, forward, backward)


def _sent(sizes: ExpertSizes, layout: Layout, forward: int, backward: int) -> Iterator[Traffic]:
    """Yield the all-to-all over expert-parallel ranks, and the gather and the sum over the ranks that share each expert."""
    passes, row, weight = forward + backward, sizes.row_bytes(sizes.hidden), sizes.router_element
    if layout.expert > 1:
        yield _traffic("rows of experts", "expert", "all_to_all", layout.expert, 2 * passes, sizes.routed * row)
        yield _traffic("weights of rows", "expert", "all_to_all", layout.expert, passes, sizes.routed * weight)
    if layout.expert_tensor > 1:
        size, rows = layout.expert_tensor, sizes.routed * layout.expert_tensor
        yield _traffic("rows of shared experts", "expert_tensor", "all_gather", size, passes, rows * row)
        yield _traffic("rows of shared experts", "expert_tensor", "reduce_scatter", size, passes, rows * row)
        yield _traffic("weights of shared rows", "expert_tensor", "all_gather", size, forward, rows * weight)
        yield _traffic("weights of shared rows", "expert_tensor", "reduce_scatter", size, backward, rows * weight)


def _gathered(sizes: ExpertSizes, layout: Layout, forward: int, backward: int) -> Iterator[Traffic]:
    """Yield the gather of all tokens, with their weights for all experts and their choices (a byte each), and the sum of the outputs."""
    if layout.num_expert_slices == 1:
        return
    tokens, passes = sizes.tokens * sizes.num_slices, forward + backward
    row, weights = tokens * sizes.row_bytes(sizes.hidden), tokens * sizes.num_experts * sizes.router_element

    def traffic(name: str, collective: Collective, num_calls: int, num_bytes: int) -> Traffic:
        return _traffic(name, "experts", collective, layout.num_expert_slices, num_calls, num_bytes)

    yield traffic("tokens of all experts", "all_gather", passes, row)
    yield traffic("tokens of all experts", "reduce_scatter", passes, row)
    yield traffic("choices of experts", "all_gather", forward, tokens * sizes.num_experts)
    yield traffic("weights of all experts", "all_gather", forward, weights)
    yield traffic("weights of all experts", "reduce_scatter", backward, weights)


def _traffic(name: str, group: Group, collective: Collective, group_size: int, num_calls: int, bytes_of_call: int) -> Traffic:
    return Traffic(name, group, collective, group_size, num_calls, num_calls * bytes_of_call)
