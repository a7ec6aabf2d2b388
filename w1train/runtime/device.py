"""The device of this process and its numeric settings."""

from __future__ import annotations

import os

import torch

from w1train.config.errors import UserError


def select_device() -> torch.device:
    """Select the GPU of this local rank, or the CPU where there is no CUDA.

    Raises:
        UserError: there are fewer GPUs than local ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK is {local_rank} but this machine has {torch.cuda.device_count()} GPUs: start at most that many processes per node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def device_name(device: torch.device) -> str:
    """Name the device, for logs and for the peak that MFU is computed with."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def memory_gib(device: torch.device) -> float:
    """Return an amount of memory in GiB: on a GPU, the largest amount that was allocated since the start; on the CPU, the amount that this
    process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import psutil

    return psutil.Process().memory_info().rss / 2**30


def make_deterministic() -> None:
    """Choose deterministic kernels, with a warning where an operation has no such kernel, and fixed workspaces for cuBLAS."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
