"""The sides that benchmarks.attention compares: this project's backends, the dense kernels of the same libraries, and two baselines.

Shapes: b = samples, q = query rows, k = key columns, n = query heads, g = key/value heads, d = channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from w1train.attention.backends.choice import BACKENDS
from w1train.attention.backends.cudnn import CudnnBackend
from w1train.attention.backends.flex import FlexBackend, compiled_flex_attention
from w1train.attention.backends.interface import AttentionBackend, missing_cuda
from w1train.attention.backends.te import BiasPlan, TransformerEngineBackend, bias_plan
from w1train.attention.visibility import Visibility
from w1train.config.rules.attention_limits import AttentionCase

Prepare = Callable[[Visibility], Any]
Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


@dataclass(slots=True, frozen=True)
class Side:
    """One way to compute a workload's attention."""

    name: str
    why_not: Callable[[AttentionCase, torch.device], str | None]
    make: Callable[[AttentionCase], tuple[Prepare, Attend]]
    dense: str | None = None
    """The name of the side with the same library's kernel without a mask; None = there is no such side."""
    everything: bool = False
    """True: the side computes all pairs, whatever is visible. Such a side measures a limit, and does not compute the workload."""


class UnfusedBackend(AttentionBackend):
    """Attention with all scores in memory, in the run's precision: matrix product, mask, softmax, matrix product, as in megatron-core's and
    transformer-engine's unfused attention. In the benchmark of the step it replaces the fp32 reference."""

    name = "reference"

    def prepare(self, visibility: Visibility) -> tuple[Tensor, Tensor]:
        """Return which pairs are hidden, bool [b, 1, q, k], and which rows see nothing, bool [b, 1, q, 1]."""
        hidden = ~visibility.dense()[:, None]
        return hidden, hidden.all(dim=-1, keepdim=True)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: tuple[Tensor, Tensor], scale: float | None = None) -> Tensor:
        """Return the attention's output, as the interface describes."""
        hidden, blind = plan
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
        # Hidden scores become the lowest finite number. With -inf, a row that sees nothing would become NaN.
        weights = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1)
        return (weights @ value).masked_fill(blind, 0.0)


def sides() -> list[Side]:
    """Return all sides, backends before baselines."""
    return [
        *(_backend_side(name) for name in ("cudnn", "flex", "te", "sdpa")),
        Side("cudnn bias", _why_no_cudnn, _cudnn_bias, dense="cudnn dense"),
        Side("te bias", _why_no_te_bias, _te_bias, dense="te dense"),
        Side("unfused", lambda _case, _device: None, _methods(UnfusedBackend)),
        Side("cudnn dense", _why_no_cudnn, partial(_sdpa_dense, (SDPBackend.CUDNN_ATTENTION,)), everything=True),
        Side("cudnn full plan", CudnnBackend.why_not, _cudnn_full_plan, everything=True),
        Side("flex dense", FlexBackend.why_not, _flex_dense, everything=True),
        Side("te dense", TransformerEngineBackend.why_not, _te_dense, everything=True),
        Side("sdpa dense", lambda _case, _device: None, partial(_sdpa_dense, ()), everything=True),
    ]


def _backend_side(name: str) -> Side:
    return Side(name, BACKENDS[name].why_not, _methods(BACKENDS[name]), dense=f"{name} dense")


def _methods(backend: type[AttentionBackend]) -> Callable[[AttentionCase], tuple[Prepare, Attend]]:
    def make(case: AttentionCase) -> tuple[Prepare, Attend]:
        made = backend(case)
        return made.prepare, made.attend

    return make


def _why_no_cudnn(_case: AttentionCase, device: torch.device) -> str | None:
    """Return the reason why torch's own cuDNN kernels cannot run here, or None."""
    return missing_cuda(device, (8, 0)) or (None if torch.backends.cudnn.is_available() else "torch was built without cuDNN")


def _why_no_te_bias(case: AttentionCase, device: torch.device) -> str | None:
    # For blocks, the te side computes the same.
    return "it is the te side" if case.kind == "blocks" else TransformerEngineBackend.why_not(case, device)


def _attend_sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kernels: tuple[SDPBackend, ...]) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if not kernels:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
    with sdpa_kernel(list(kernels)):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=grouped)


def _cudnn_bias(_case: AttentionCase) -> tuple[Prepare, Attend]:
    """Return attention through cuDNN with the mask as a bias. LLaDA2.0 says that it trains in this way; this side works without
    transformer-engine."""

    def attend(query: Tensor, key: Tensor, value: Tensor, plan: BiasPlan) -> Tensor:
        output = _attend_sdpa(query, key, value, plan.bias, (SDPBackend.CUDNN_ATTENTION,))
        return output.masked_fill(plan.blind_rows[:, None, :, None], 0.0)

    return bias_plan, attend


def _te_bias(case: AttentionCase) -> tuple[Prepare, Attend]:
    return bias_plan, TransformerEngineBackend(case).attend


def _te_dense(case: AttentionCase) -> tuple[Prepare, Attend]:
    """Return attention without a mask and without boundaries of documents, by transformer-engine."""
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(case.num_heads, case.channels, case.num_groups)

    def attend(query: Tensor, key: Tensor, value: Tensor, _plan: None) -> Tensor:
        batch_first = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
        output = module(*batch_first, qkv_format="bshd", attn_mask_type="no_mask")
        return output.unflatten(-1, (query.shape[1], -1)).transpose(1, 2)

    return _no_plan, attend


def _sdpa_dense(kernels: tuple[SDPBackend, ...], _case: AttentionCase) -> tuple[Prepare, Attend]:
    return _no_plan, lambda query, key, value, _plan: _attend_sdpa(query, key, value, None, kernels)


def _flex_dense(_case: AttentionCase) -> tuple[Prepare, Attend]:
    def attend(query: Tensor, key: Tensor, value: Tensor, _plan: None) -> Tensor:
        return compiled_flex_attention()(query, key, value, enable_gqa=query.shape[1] != key.shape[1])

    return _no_plan, attend


def _cudnn_full_plan(case: AttentionCase) -> tuple[Prepare, Attend]:
    """Return attention by the interval kernels, with everything visible."""
    backend = CudnnBackend(case)

    def prepare(visibility: Visibility) -> Any:
        full = torch.zeros_like(visibility.endpoints)
        full[:] = visibility.num_keys
        return backend.prepare(Visibility(full, visibility.num_keys))

    return prepare, backend.attend


def _no_plan(_visibility: Visibility) -> None:
    return None
