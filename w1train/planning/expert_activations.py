"""Bytes that the routed experts of a layer save for the backward pass, and hold while tokens travel to them and back.

Shapes: p = tokens that a rank routes, n = experts of a layer, k = experts of a token, r = rows that a rank's experts compute (a token, once
for each of its experts there), i = inner width of an expert on a rank, h = hidden size, e = bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from w1train.config.schema import ModelConfig
from w1train.planning.layout import Dispatcher, Layout
from w1train.planning.state import FP32_BYTES

_INT64_BYTES = 8


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """The sizes of a layer with experts, for one micro-batch on the rank whose experts get the most tokens."""

    element: int
    router_element: int
    """Bytes of a logit of the router, and of the weight of a row."""
    hidden: int
    inner: int
    shared_inner: int
    """Inner width of the shared expert on a rank; 0 = there is no shared expert."""
    num_experts: int
    num_active: int
    num_local: int
    """Experts of a rank."""
    num_slices: int
    """Ranks that share the experts of a layer."""
    tokens: int
    """p."""
    rows: int
    """r."""
    saves_scores: bool
    """True: autograd saves a score of every expert. False: the softmax is over the chosen experts alone."""
    normalizes_scores: bool
    dispatcher: Dispatcher

    @property
    def routed(self) -> int:
        """Rows that a rank sends to experts."""
        return self.tokens * self.num_active

    @property
    def rows_per_expert(self) -> float:
        """Mean number of rows of an expert of the rank."""
        return self.rows / self.num_local

    def row_bytes(self, width: int) -> int:
        """Return the bytes of a row of this width."""
        return width * self.element


def expert_sizes(model: ModelConfig, layout: Layout, tokens: int, element: int, imbalance: float) -> ExpertSizes | None:
    """Return the sizes of a layer with experts; None for a dense model.

    Args:
        tokens: those of a rank in the residual stream.
        imbalance: rows of the rank that has the most, divided by their mean over ranks. No rank can have more than all rows.
    """
    experts = model.experts
    if not experts.num_experts:
        return None
    pre_softmax = not experts.normalize or experts.num_active == 1
    return ExpertSizes(
        element=element,
        router_element=FP32_BYTES if experts.router_precision == "fp32" else element,
        hidden=model.hidden_size,
        inner=experts.ffn_hidden_size // layout.expert_tensor,
        shared_inner=experts.shared_ffn_hidden_size // layout.tensor,
        num_experts=experts.num_experts,
        num_active=experts.num_active,
        num_local=experts.num_experts // layout.expert,
        num_slices=layout.num_expert_slices,
        tokens=tokens,
        rows=round(tokens * experts.num_active * layout.expert_tensor * min(imbalance, layout.expert)),
        saves_scores=experts.score == "sigmoid" or pre_softmax,
        normalizes_scores=experts.score == "sigmoid" and experts.num_active > 1,
        dispatcher=layout.expert_dispatcher,
    )


def router_bytes(sizes: ExpertSizes) -> int:
    """Return the bytes that the choice of experts saves: the scores in fp32, the chosen experts' numbers, and their scores, which a sigmoid
    divides by their sum."""
    chosen = sizes.routed * _INT64_BYTES
    if sizes.normalizes_scores:
        chosen += (sizes.routed + sizes.tokens) * FP32_BYTES
    elif not sizes.saves_scores:
        chosen += sizes.routed * FP32_BYTES
    return chosen + (sizes.tokens * sizes.num_experts * FP32_BYTES if sizes.saves_scores else 0)


def permutation_bytes(sizes: ExpertSizes) -> int:
    """Return the bytes of what says which row goes where. The all-to-all dispatcher keeps a place of each row, and the order of all pairs
    of an expert and a token, of which the first are the rows. The all-gather dispatcher keeps a place of each row, and for each pair of an
    expert of its own and a gathered token the weight, and a byte that tells whether there is a row."""
    if sizes.dispatcher == "all_to_all":
        return (sizes.routed + sizes.tokens * sizes.num_experts) * _INT64_BYTES
    gathered = sizes.tokens * sizes.num_slices * sizes.num_local
    return sizes.rows * _INT64_BYTES + gathered * (sizes.router_element + 1)


def expert_bytes(sizes: ExpertSizes) -> int:
    """Return the bytes that router, permutation and experts save. For each row the experts save their input, [gate, up], SiLU of the gate,
    its product with up, the product with the row's weight, and the weight."""
    of_row = sizes.row_bytes(sizes.hidden + 5 * sizes.inner) + sizes.router_element
    return router_bytes(sizes) + permutation_bytes(sizes) + sizes.rows * of_row


def dispatch_bytes(sizes: ExpertSizes) -> int:
    """Return the largest number of bytes that exist while rows travel, besides what autograd saves: the rows that a rank sends, those that
    it receives, and the latter once more, sorted by expert; of their gradients there are as many."""
    sent = sizes.routed if sizes.dispatcher == "all_to_all" else sizes.tokens * sizes.num_slices
    return (sent + 2 * sizes.rows) * sizes.row_bytes(sizes.hidden)
