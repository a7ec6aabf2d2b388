"""A mixture of experts as its equations say it: every expert computes every token, and nothing is sent anywhere.

Shapes: T = tokens, E = experts, I = inner width of an expert, h = hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from w1train.config.schema_model import ExpertsConfig


def naive_weights(logits, bias, experts: ExpertsConfig):
    """Return the weight of each expert for each token, [T, E], zero for experts that are not chosen."""
    scores = logits.sigmoid() if experts.score == "sigmoid" else logits.softmax(dim=1)
    wanted = scores.detach() if bias is None else scores.detach() + bias
    if experts.num_groups > 1:
        groups = wanted.unflatten(1, (experts.num_groups, -1))
        of_group = groups.sort(dim=2, descending=True).values[:, :, : experts.num_active // experts.num_active_groups].sum(dim=2)
        order = of_group.argsort(dim=1, descending=True)[:, : experts.num_active_groups]
        is_allowed = torch.zeros_like(of_group).scatter(1, order, 1).bool()
        wanted = groups.masked_fill(~is_allowed[:, :, None], -torch.inf).flatten(1)
    chosen = wanted.argsort(dim=1, descending=True)[:, : experts.num_active]
    weights = torch.where(torch.zeros_like(scores).scatter(1, chosen, 1).bool(), scores, torch.zeros_like(scores))
    if experts.num_active > 1 and (experts.normalize or experts.score == "sigmoid"):
        weights = weights / weights.sum(dim=1, keepdim=True)
    return weights * experts.scale


def swiglu(rows, gate, up, down):
    return (F.silu(rows @ gate.T) * (rows @ up.T)) @ down.T


def naive_layer(experts: ExpertsConfig):
    """Return a function that takes the place of ExpertLayer.forward on a rank that has all experts."""

    def forward(layer, hidden_states, tokens=None):
        rows = hidden_states.flatten(0, 1)
        weights = naive_weights(rows @ layer.router.weight.T, layer.router.expert_bias, experts)
        fc1, fc2 = layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight
        output = sum(weights[:, [expert]] * swiglu(rows, *fc1[expert], fc2[expert]) for expert in range(len(fc1)))
        if layer.shared_experts is not None:
            gate, up = layer.shared_experts.linear_fc1.weight.chunk(2)
            output = output + swiglu(rows, gate, up, layer.shared_experts.linear_fc2.weight)
        return output.view_as(hidden_states), None

    return forward
