"""The choice between a Triton kernel and its PyTorch twin, by device or by configuration.

This module does not import Triton, so that a run on the CPU does not spend time on it. The modules with Triton kernels are imported when a
kernel is first used.
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
"""Elements of the widest row that a program of the row kernels holds in registers."""


def runs_triton(x: torch.Tensor, implementation: Implementation, *, row_size: int = 0) -> bool:
    """Tell whether a kernel on ``x`` is Triton's. The Triton interpreter (TRITON_INTERPRET=1) takes CPU tensors too.

    Raises:
        UserError: ``implementation`` is triton, and Triton cannot run.
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
    """Tell whether triton can be imported. torch for CUDA on Linux installs it."""
    return find_spec("triton") is not None
