"""Triton or its PyTorch twin: by device, or as the configuration says.

Nothing here imports Triton, so that a CPU run never pays for it; the Triton files are imported at the first use of a kernel.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from w1train.config.errors import UserError

Implementation = Literal["auto", "triton", "torch"]

MAX_ROW = 16384
"""Widest row that a program of the row kernels holds in registers."""


def runs_triton(x: torch.Tensor, implementation: Implementation, *, row_size: int = 0) -> bool:
    """Whether a kernel on ``x`` is Triton's. The Triton interpreter (TRITON_INTERPRET=1) takes CPU tensors too.

    Raises:
        UserError: Triton is asked for where it cannot run.
    """
    if implementation == "torch":
        return False
    obstacle = _obstacle(x.device.type, row_size)
    if implementation == "triton" and obstacle is not None:
        raise UserError(f"kernels.elementwise is triton, but {obstacle}; set kernels.elementwise=auto or torch")
    return obstacle is None and (implementation == "triton" or x.device.type == "cuda")


def _obstacle(device: str, row_size: int) -> str | None:
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton's kernels need CUDA tensors and these are on {device}"
    if row_size > MAX_ROW:
        return f"a row of {row_size} elements does not fit a program ({MAX_ROW} at most)"
    return None if has_triton() else "triton is not installed"


@cache
def has_triton() -> bool:
    """Whether triton can be imported; it comes with torch for CUDA on Linux."""
    return find_spec("triton") is not None
