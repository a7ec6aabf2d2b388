"""Host memory that a state is copied into at its step, so that it can be written while the next steps change the state.

The memory is allocated once and used for every save. Allocating costs more than the copy, because the kernel makes zeroed pages one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from w1train.runtime.background import in_background, nothing
from w1train.runtime.streams import side_stream

logger = logging.getLogger(__name__)

_ALIGNMENT = 64


class Staging:
    """The buffers of one rank, which have as many bytes as the rank writes."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._touched = nothing()

    def prepare(self, tensors: Sequence[Tensor]) -> None:
        """Allocate the memory for tensors like these. A thread makes the kernel provide its pages while training continues."""
        assert not self._buffers
        memory, self._buffers = _allocate(tensors)
        device = _device_of(tensors)
        self._touched = in_background(partial(_make_ready, memory, device), "checkpoint memory")

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of the tensors, which are complete when this returns and valid until the next call.

        The tensors have the same shapes and types at every call. On CUDA the copy runs on a stream of its own, after the work that is
        queued on the model's stream, and the host waits for it.
        """
        if not self._buffers:
            self.prepare(tensors)
        self._touched.result()
        assert len(self._buffers) == len(tensors)
        device = _device_of(tensors)
        if device is None:
            _copy(self._buffers, tensors)
            return self._buffers
        stream = side_stream("checkpoint", device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            _copy(self._buffers, tensors)
        stream.synchronize()
        return self._buffers


def _copy(buffers: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for buffer, tensor in zip(buffers, tensors, strict=True):
        buffer.copy_(tensor, non_blocking=True)


def _allocate(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return one block of memory, and empty tensors like the given ones in it. Each tensor has a storage of its own."""
    ends, total = [], 0
    for tensor in tensors:
        start = -(-total // _ALIGNMENT) * _ALIGNMENT
        total = start + tensor.numel() * tensor.itemsize
        ends.append((start, total))
    memory = torch.empty(max(total, 1), dtype=torch.uint8)
    pieces = memory.numpy()
    return memory, [
        torch.from_numpy(pieces[start:end]).view(tensor.dtype).view(tensor.shape)
        for (start, end), tensor in zip(ends, tensors, strict=True)
    ]


def _device_of(tensors: Sequence[Tensor]) -> torch.device | None:
    """Return the GPU that the tensors are on, or None for tensors on the CPU."""
    return next((tensor.device for tensor in tensors if tensor.is_cuda), None)


def _make_ready(memory: Tensor, device: torch.device | None) -> None:
    """Make the kernel provide the memory's pages, and pin them so that the GPU can copy to them without the CPU. torch's pool of pinned
    memory is not used, because it allocates powers of two."""
    memory.zero_()
    if device is None:
        return
    with torch.cuda.device(device):
        status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(status) != 0:
        size = memory.numel() / 2**30
        logger.warning(
            "%.1f GiB of buffers for checkpoints could not be pinned (CUDA error %d): training waits longer for saves", size, int(status)
        )
