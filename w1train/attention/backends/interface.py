"""The interface of attention backends.

Shapes: b = samples, q = query rows, k = key columns, n = query heads of this rank, g = key/value heads of this rank, d = channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from w1train.attention.visibility import Visibility
from w1train.config.rules.attention_limits import AttentionCase, limit


class AttentionBackend(ABC):
    """softmax(Q K^T scale) V over the visible keys, for one case. Visibility is prepared once a micro-batch, for all layers."""

    name: ClassVar[str]

    def __init__(self, case: AttentionCase | None = None) -> None:
        """
        Args:
            case: None = heads are not known. Only dense kernels can be used without a case.
        """
        self.case = case

    @classmethod
    def why_not(cls, case: AttentionCase, device: torch.device) -> str | None:
        """Return why the backend cannot compute the case on the device; None = it can."""
        return limit(cls.name, case) or cls.missing(device)

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """Return what the machine lacks for the backend; None = it lacks nothing."""
        return None

    @abstractmethod
    def prepare(self, visibility: Visibility) -> Any:
        """Return what the kernels read of one micro-batch. It is called outside the layers, which share it with recomputation."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: Any, scale: float | None = None) -> Tensor:
        """Return attention [b, n, q, d]. It is zero in rows that see nothing, and these rows get no gradient.

        Args:
            query: [b, n, q, d]; key, value: [b, g, k, d], where n is a multiple of g.
            plan: what ``prepare`` returned.
            scale: None = 1 / sqrt(d).
        """


def missing_cuda(device: torch.device, lowest: tuple[int, int]) -> str | None:
    """Return why kernels that need a GPU of at least this compute capability cannot run; None = they can."""
    if device.type != "cuda":
        return f"it needs a GPU, and runs on {device.type}"
    found = torch.cuda.get_device_capability(device)
    if found < lowest:
        return f"it needs compute capability {lowest[0]}.{lowest[1]}, and the GPU has {found[0]}.{found[1]}"
    return None
