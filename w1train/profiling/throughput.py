"""Speed of a step: tokens per second, model TFLOP/s per device, and MFU against the device's dense bf16 peak.

w1train/model/flops.py counts the FLOPs of a step.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# (words that the device's name must all have, dense bf16 TFLOP/s). The first match counts, so that a form factor comes before its
# family. The numbers are from NVIDIA's data sheets, with fp32 accumulation, and half of what a sheet gives with sparsity:
# "H100 Tensor Core GPU" (SXM 1,979; PCIe 1,513; NVL 1,671 with sparsity), "H200 Tensor Core GPU" (SXM 1,979; NVL 1,671),
# "GH200 Grace Hopper Superchip" (1,979), "A100 Tensor Core GPU" (312 dense; the A800 is its export version, slower only in
# NVLink, as the H800 is the H100's), "GB200 NVL72 / HGX B200" (5 and 4.5 PFLOP/s a GPU with sparsity), "L40S" (362.05 dense),
# "L40" (181.05 dense), "L4" (242 with sparsity), "A10" (125 dense), "A30" (165 dense).
_PEAK_TFLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("H100", "PCIE"), 756.5),
    (("H100", "NVL"), 835.5),
    (("H100",), 989.5),
    (("H800", "PCIE"), 756.5),
    (("H800",), 989.5),
    (("H200", "NVL"), 835.5),
    (("H200",), 989.5),
    (("GH200",), 989.5),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("B200",), 2250.0),
    (("GB200",), 2500.0),
    (("L40S",), 362.0),
    (("L40",), 181.0),
    (("L4",), 121.0),
    (("A30",), 165.0),
    (("A10",), 125.0),
)


def device_peak_tflops(device_name: str) -> float | None:
    """Return the dense bf16 peak, in TFLOP/s, of a device as ``torch.cuda.get_device_name`` calls it ("NVIDIA H100 80GB HBM3").

    It is None where the peak is not known: for CPUs, other accelerators, and MIG slices, which are a part of the device that they name.
    """
    words = set(re.split(r"[\s\-_/]+", device_name.upper()))
    if "MIG" in words:
        return None
    for required, peak in _PEAK_TFLOPS:
        if words.issuperset(required):
            return peak
    return None


class StepTimer:
    """The clock of one rank's optimizer steps, which gives the ``time/`` part of their records.

    A step lasts from one call of :meth:`finish` to the next, so that nothing between two steps is left out. Work that does not belong to a
    step (validation, samples, checkpoints) is followed by :meth:`restart`.
    """

    def __init__(
        self,
        world_size: int,
        peak_tflops: float | None,
        clock: Callable[[], float] = time.perf_counter,
        communication: Callable[[], float] | None = None,
    ) -> None:
        """Start the first step.

        Args:
            peak_tflops: dense bf16 peak of one device; None = unknown.
            communication: returns the seconds of communication since its last call; None = communication is not timed.
        """
        self.world_size = world_size
        self.peak_tflops = peak_tflops
        self._clock, self._communication = clock, communication
        self.restart()

    def restart(self) -> None:
        """Start the next step now."""
        self._start = self._clock()
        self._data_wait = 0.0
        if self._communication is not None:
            self._communication()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = self._clock()
        yield
        self._data_wait += self._clock() - start

    def finish(self, num_tokens: int, flops: float) -> dict[str, float | None]:
        """End the step and return its times and rates. On CUDA this is called after the loss has been read: before, kernels still run.

        ``num_tokens`` and ``flops`` (model FLOPs, forward and backward) count the whole step, over all ranks. MFU is a fraction, and None
        where the peak is not known.
        """
        seconds, data_wait = self._clock() - self._start, self._data_wait
        communication = {} if self._communication is None else {"time/communication_seconds": self._communication()}
        self.restart()
        tflops_per_second = flops / seconds / self.world_size / 1e12
        return {
            "time/step_seconds": seconds,
            "time/tokens_per_second": num_tokens / seconds,
            "time/tflops_per_second": tflops_per_second,
            "time/mfu": tflops_per_second / self.peak_tflops if self.peak_tflops else None,
            "time/data_wait_seconds": data_wait,
            **communication,
        }
