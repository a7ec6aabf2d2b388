"""cudnn.flex_attention (nvidia-cudnn-frontend): kernels for Hopper and Blackwell whose masks are this project's endpoints.

Shapes: b = samples, q = query rows, k = key columns, e = num_endpoints, n = query heads, g = key/value heads, d = channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from w1train.attention.backends.interface import AttentionBackend, missing_cuda
from w1train.attention.visibility import Visibility
from w1train.config.rules.attention_limits import AttentionCase
from w1train.runtime.streams import keep_for, side_stream, tensors_in

_CAPABILITIES = ((9, 0), (10, 0), (10, 3))


@dataclass(slots=True)
class CudnnPlan:
    """A mask plan, which another stream may still be computing."""

    mask_plan: Any
    ready: torch.cuda.Event | None
    """The event that the stream of the plan records at its end; None = the plan is finished."""
    tensors: tuple[Tensor, ...]
    """The tensors of the plan. Their memory must not be reused before all streams that read them have read them."""


class CudnnBackend(AttentionBackend):
    """cuDNN's flex attention. Kernels sort tiles into empty, full and partial once a micro-batch, and rows that see nothing give zero."""

    name = "cudnn"

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """Return what is missing: a GPU of a supported generation, or the packages."""
        reason = missing_cuda(device, min(_CAPABILITIES))
        if reason is None and torch.cuda.get_device_capability(device) not in _CAPABILITIES:
            known = ", ".join(f"{major}.{minor}" for major, minor in _CAPABILITIES)
            reason = f"it has kernels for compute capabilities {known} alone"
        return reason or missing_packages()

    def __init__(self, case: AttentionCase | None = None) -> None:
        super().__init__(case)
        assert case is not None
        self._case = case

    def prepare(self, visibility: Visibility) -> CudnnPlan:
        """Compute the plan on a stream of its own.

        The computation ends in a copy to the host, which on the caller's stream would wait for all earlier work. The new stream first waits
        for the work that the caller's stream has at this moment, because the computation of the endpoints is part of this work.
        """
        assert visibility.scattered is None
        device = visibility.endpoints.device
        stream = side_stream("attention plan", device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            mask_plan = create_plan(visibility, self._case, backward=torch.is_grad_enabled())
            ready = torch.cuda.Event()
            ready.record()
        return CudnnPlan(mask_plan, ready, tuple(tensors_in(mask_plan)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: CudnnPlan, scale: float | None = None) -> Tensor:
        """Compute AttentionBackend.attend."""
        from cudnn.flex_attention import flex_attn_func

        if plan.ready is not None:
            stream = torch.cuda.current_stream(query.device)
            stream.wait_event(plan.ready)
            keep_for(stream, plan.tensors)
            plan.ready = None
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output = flex_attn_func(query, key, value, mask_plan=plan.mask_plan, softmax_scale=scale, deterministic=self._case.deterministic)
        return output.transpose(1, 2)


def create_plan(visibility: Visibility, case: AttentionCase, *, backward: bool) -> Any:
    """Return cudnn.flex_attention's MaskPlan. It reads only the shapes of query, key and value, so these are expanded from one channel."""
    from cudnn.flex_attention import create_mask_plan

    num_endpoints, num_samples, num_rows = visibility.endpoints.shape
    channel = torch.empty(case.channels, dtype=torch.bfloat16, device=visibility.endpoints.device)
    query = channel.expand(num_samples, num_rows, case.num_heads, -1)
    key = channel.expand(num_samples, visibility.num_keys, case.num_groups, -1)
    endpoints = visibility.endpoints.reshape(1, num_endpoints, num_samples * num_rows).contiguous()
    return create_mask_plan(endpoints, query, key, key, build_backward=backward)


def missing_packages() -> str | None:
    """Return which packages must be installed; None = all of them are installed. cudnn.flex_attention is in its package since 1.29."""
    if all(find_spec(module) for module in ("cudnn", "cudnn.flex_attention", "cutlass")):
        return None
    return "it needs nvidia-cudnn-frontend >= 1.29 and nvidia-cutlass-dsl (pip install -e '.[cudnn]')"
