"""The decisions of the routers of a mixture of experts, in a form that does not depend on the layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.model.experts.router import ExpertRouter  # noqa: E402
from w1train.model.transformer import DiffusionTransformer  # noqa: E402


@dataclass
class Routing:
    """The decisions about each token, and what the routers have counted."""

    rows: list[tuple[int, ...]] = field(default_factory=list)
    """Sorted: step, layer, token id, position in the document, kind of token, and the chosen experts as bits of a number."""
    counts: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer -> float64 [kinds, E], the counts of the last step."""

    def of_all_ranks(self, stages: Iterable[torch.nn.Module]) -> Routing:
        """Return the decisions and counts of all ranks, on every rank."""
        gathered: list = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (self.rows, {router.layer_number: router.counts.numpy() for router in routers(stages)}))
        counts: dict[int, torch.Tensor] = {}
        for _, of_rank in gathered:
            for layer, count in of_rank.items():
                counts[layer] = counts.get(layer, 0) + torch.from_numpy(count)
        return Routing(sorted(row for rows, _ in gathered for row in rows), counts)


def routers(stages: Iterable[torch.nn.Module]) -> list[ExpertRouter]:
    """Return the routers of a rank's stages."""
    return [module for stage in stages for module in stage.modules() if isinstance(module, ExpertRouter)]


def open_router(router: ExpertRouter) -> None:
    """Make the gaps between scores so wide that rounding changes no decision, and give the bias values."""
    router.weight.mul_(16)
    if router.expert_bias is not None:
        generator = torch.Generator().manual_seed(router.layer_number)
        router.expert_bias.copy_(torch.randn(router.expert_bias.shape, generator=generator) * 0.1)


@contextmanager
def noted_routing(notes: Routing, step: int) -> Iterator[None]:
    """Note the decisions of a step. Those of a run without gradients, which full recomputation repeats, are left out."""
    route, tokens_of = ExpertRouter.forward, DiffusionTransformer._routed_tokens

    def with_identity(self, inputs):
        tokens = tokens_of(self, inputs)
        if tokens is not None:
            tokens.kinds.identity = self._local(torch.stack([inputs.input_ids, inputs.positions.long()], dim=-1))
        return tokens

    def noted(self, hidden_states, tokens=None):
        weights, is_chosen = route(self, hidden_states, tokens)
        if tokens is not None and torch.is_grad_enabled():
            chosen = (is_chosen.long() << torch.arange(is_chosen.shape[1])).sum(dim=1)
            columns = [*tokens.kinds.identity.flatten(0, 1).T, tokens.kinds.flatten().long(), chosen]
            notes.rows += [(step, self.layer_number, *row) for row in torch.stack(columns, dim=1).tolist()]
        return weights, is_chosen

    ExpertRouter.forward, DiffusionTransformer._routed_tokens = noted, with_identity
    try:
        yield
    finally:
        ExpertRouter.forward, DiffusionTransformer._routed_tokens = route, tokens_of
