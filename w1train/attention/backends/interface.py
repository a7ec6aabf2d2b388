"""What every attention backend is.

Shapes: b = samples, q = query rows, k = key columns, n = query heads of this rank, g = key/value heads of this rank, d = channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from w1train.attention.visibility import Visibility
from w1train.config.rules.attention_limits import AttentionCase, limit
from w1train.config.schema import BackendName


class AttentionBackend(ABC):
    """softmax(Q K^T scale) V over the visible keys, for one case. What is visible is prepared once a micro-batch, for all layers."""

    name: ClassVar[BackendName]

    def __init__(self, case: AttentionCase | None = None) -> None:
        """case: None where nothing is known of the heads; only dense kernels do without."""
        self.case = case

    @classmethod
    def why_not(cls, case: AttentionCase, device: torch.device) -> str | None:
        """Why it cannot serve the case on the device; None = it can."""
        return limit(cls.name, case) or cls.missing(device)

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """What the machine lacks for it."""
        return None

    @abstractmethod
    def prepare(self, visibility: Visibility) -> Any:
        """What the kernels read, of one micro-batch; called outside the layers, reused by them and by recomputation."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: Any, scale: float | None = None) -> Tensor:
        """query [b, n, q, d], key and value [b, g, k, d], n a multiple of g -> [b, n, q, d].

        Rows that see nothing give zero and get no gradient. scale: None = 1 / sqrt(d).
        """


def missing_cuda(device: torch.device, lowest: tuple[int, int]) -> str | None:
    """Why kernels that need a GPU of at least this compute capability cannot run."""
    if device.type != "cuda":
        return f"it needs a GPU, and runs on {device.type}"
    found = torch.cuda.get_device_capability(device)
    if found < lowest:
        return f"it needs compute capability {lowest[0]}.{lowest[1]}, and the GPU has {found[0]}.{found[1]}"
    return None
