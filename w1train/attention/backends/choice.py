"""The choice of a backend for a case: the backend that the configuration names, or the first that can compute the case."""

from __future__ import annotations

from functools import cache

import torch

from w1train.attention.backends.cudnn import CudnnBackend
from w1train.attention.backends.flex import FlexBackend
from w1train.attention.backends.interface import AttentionBackend
from w1train.attention.backends.reference import ReferenceBackend
from w1train.attention.backends.sdpa import SdpaBackend
from w1train.attention.backends.te import TransformerEngineBackend
from w1train.config.errors import UserError, look_up
from w1train.config.rules.attention_limits import AttentionCase
from w1train.runtime.kernel_choices import note_kernel

# The order in which "auto" tries the backends: kernels that skip pairs that are not visible, then kernels that skip such pairs only with
# one stream, then dense kernels.
BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend for backend in (CudnnBackend, FlexBackend, TransformerEngineBackend, SdpaBackend, ReferenceBackend)
}


@cache
def choose_backend(name: str, case: AttentionCase, device: torch.device) -> AttentionBackend:
    """Return the backend of a phase. The choice is made, and logged, once for each case.

    Raises:
        UserError: there is no such backend, or it cannot compute the case on this device. No other backend is taken in its place.
    """
    if name != "auto":
        named = look_up(BACKENDS, "attention.backend", name)
        reason = named.why_not(case, device)
        if reason is not None:
            raise UserError(f"attention.backend is {name}, which cannot serve {_describe(case)}: {reason}. auto takes a backend that can")
        note_kernel("attention", name, f"attention of {_describe(case)}: {name}, as attention.backend says")
        return named(case)
    passed_over: list[tuple[str, str]] = []
    for backend in BACKENDS.values():
        reason = backend.why_not(case, device)
        if reason is None:
            others = "".join(f"; not {other}: {why}" for other, why in passed_over)
            note_kernel("attention", backend.name, f"attention of {_describe(case)}: {backend.name}{others}")
            return backend(case)
        passed_over.append((backend.name, reason))
    raise AssertionError("the dense kernels serve everything")


def _describe(case: AttentionCase) -> str:
    kinds = {
        "documents": "masked diffusion",
        "causal": "autoregression",
        "extent": "masked diffusion with a growing extent",
        "scattered": "masked diffusion with pairs at random",
        "blocks": "block diffusion",
    }
    return f"{kinds[case.kind]} ({case.num_heads} heads of {case.channels} on {case.num_groups}, {case.precision})"
