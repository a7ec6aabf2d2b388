"""transformer-engine's DotProductAttention: packed documents for one stream, an additive mask for everything else.

LLaDA2.0 trains block diffusion with such a mask (docs/attention.md). With this dense mask and small blocks, four times as many pairs are
computed as are visible. The backend is therefore a baseline for kernels that skip pairs.

Shapes: b = samples, q = query rows, k = key columns, n = query heads, g = key/value heads, d = channels, t = b * q.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from w1train.attention.backends.interface import AttentionBackend, missing_cuda
from w1train.attention.visibility import Visibility
from w1train.config.rules.attention_limits import AttentionCase

_LOWEST_CAPABILITY = (8, 0)


@dataclass(slots=True)
class PackedPlan:
    """The documents of all samples, concatenated. Each stretch of padding counts as a document."""

    boundaries: Tensor
    """int32 [documents + 1], ascending from 0 to t."""
    longest: int
    blind_rows: Tensor
    """bool [b, q]: padding, whose output is set to zero."""


@dataclass(slots=True)
class BiasPlan:
    """A mask that is added to the scores."""

    bias: Tensor
    """bfloat16 [b or 1, 1, q, k], 0 = visible, otherwise a large negative number; all 0 in rows that see nothing."""
    blind_rows: Tensor
    """bool [b or 1, q]: rows that see nothing."""


class TransformerEngineBackend(AttentionBackend):
    """transformer-engine's fused kernels. The backend raises if no fused kernel supports a case, because transformer-engine would
    otherwise compute without fusion unnoticed."""

    name = "te"

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """Return what is missing: a GPU, or the package."""
        reason = missing_cuda(device, _LOWEST_CAPABILITY)
        if reason is None and find_spec("transformer_engine") is None:
            reason = "it needs transformer-engine (pip install --no-build-isolation -e '.[te]')"
        return reason

    def __init__(self, case: AttentionCase | None = None) -> None:
        super().__init__(case)
        assert case is not None
        self._case = case
        self._modules: dict[float | None, Any] = {}

    def prepare(self, visibility: Visibility) -> PackedPlan | BiasPlan:
        """Return the boundaries of documents if a flash kernel supports the mask, otherwise the mask."""
        return packed_plan(visibility) if self._case.kind in ("documents", "causal") else bias_plan(visibility)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: PackedPlan | BiasPlan, scale: float | None = None) -> Tensor:
        """Compute AttentionBackend.attend."""
        if isinstance(plan, PackedPlan):
            output = self._packed(query, key, value, plan, scale)
        else:
            output = self._biased(query, key, value, plan, scale)
        return output.masked_fill(plan.blind_rows[:, None, :, None], 0.0)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, plan: PackedPlan, scale: float | None) -> Tensor:
        packed = (tensor.transpose(1, 2).flatten(0, 1).contiguous() for tensor in (query, key, value))
        output = self._module(scale)(
            *packed,
            qkv_format="thd",
            attn_mask_type="padding_causal" if self._case.kind == "causal" else "padding",
            cu_seqlens_q=plan.boundaries,
            cu_seqlens_kv=plan.boundaries,
            max_seqlen_q=plan.longest,
            max_seqlen_kv=plan.longest,
        )
        num_samples, num_heads, num_rows, _ = query.shape
        return output.reshape(num_samples, num_rows, num_heads, -1).transpose(1, 2)

    def _biased(self, query: Tensor, key: Tensor, value: Tensor, plan: BiasPlan, scale: float | None) -> Tensor:
        batch_first = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
        output = self._module(scale)(
            *batch_first,
            qkv_format="bshd",
            attn_mask_type="no_mask",
            core_attention_bias_type="post_scale_bias",
            core_attention_bias=plan.bias,
        )
        return output.unflatten(-1, (query.shape[1], -1)).transpose(1, 2)

    def _module(self, scale: float | None) -> Any:
        """Return the module, which has no parameters, so that all layers share it."""
        if scale not in self._modules:
            os.environ["NVTE_UNFUSED_ATTN"] = "0"
            if self._case.deterministic:
                os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
            from transformer_engine.pytorch import DotProductAttention

            case = self._case
            self._modules[scale] = DotProductAttention(case.num_heads, case.channels, case.num_groups, softmax_scale=scale)
        return self._modules[scale]


def packed_plan(visibility: Visibility) -> PackedPlan:
    """Return the plan of endpoints (0, start, end): a document begins where the start changes, and where a sample or its padding begins."""
    start, end = visibility.endpoints[1:]
    blind = end <= start
    edge = torch.ones_like(blind[:, :1])
    changes = (start[:, 1:] != start[:, :-1]) | (blind[:, 1:] != blind[:, :-1])
    first = torch.cat([edge, changes], dim=1).flatten().nonzero()[:, 0]
    boundaries = torch.cat([first, first.new_tensor([start.numel()])])
    return PackedPlan(boundaries.to(torch.int32), int(boundaries.diff().max()), blind)


def bias_plan(visibility: Visibility) -> BiasPlan:
    """Return the plan of an arbitrary mask. It adds -2^50, as transformer-engine's example does: bf16 can represent this number, and no
    score is large enough to cancel it."""
    mask = visibility.dense()
    blind = ~mask.any(dim=-1)
    bias = torch.zeros(mask.shape, dtype=torch.bfloat16, device=mask.device).masked_fill_(~(mask | blind[..., None]), -(2.0**50))
    return BiasPlan(bias[:, None], blind)
