"""Host memory into which a state is copied at its step, so that it can be written while the next steps change it.

The memory is taken once and used again for every save: taking it (the kernel hands out zeroed pages one by one) costs more than the copy.
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
    """The buffers of one rank, of as many bytes as it writes."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._touched = nothing()

    @property
    def num_bytes(self) -> int:
        """Of host memory held."""
        return sum(buffer.numel() * buffer.itemsize for buffer in self._buffers)

    def prepare(self, tensors: Sequence[Tensor]) -> None:
        """Take the memory for tensors like these; the kernel makes its pages beside what goes on."""
        assert not self._buffers
        memory, self._buffers = _allocate(tensors)
        device = _device_of(tensors)
        self._touched = in_background(partial(_make_ready, memory, device), "checkpoint memory")

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the tensors, the same ones in shape and type at every call; they are there when this returns, and hold until the next.

        On CUDA the copy runs on a stream of its own, after what is queued on the model's; the host waits for it.
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
    """Memory, and empty tensors like the given ones cut out of it. Each has a storage of its own."""
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
    """The GPU that they are on, if they are on one."""
    return next((tensor.device for tensor in tensors if tensor.is_cuda), None)


def _make_ready(memory: Tensor, device: torch.device | None) -> None:
    """Let the kernel make its pages, and let the GPU copy to them without help. Not through torch's pool of pinned memory, which takes
    powers of two."""
    memory.zero_()
    if device is None:
        return
    with torch.cuda.device(device):
        status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(status) != 0:
        size = memory.numel() / 2**30
        logger.warning("%.1f GiB of buffers for checkpoints could not be pinned (CUDA error %d): saves stall longer", size, int(status))
