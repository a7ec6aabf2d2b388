"""Speed of a step: tokens per second, model TFLOP/s per device, and MFU against the device's dense bf16 peak.

The FLOPs of a step are counted by the model; here they are only divided.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# (words of the device's name that must all be there, dense bf16 TFLOP/s); the first match counts, so a form factor stands
# before its family. From NVIDIA's data sheets, with fp32 accumulation; where a sheet gives the rate with sparsity, half of it:
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
    """Dense bf16 peak, TFLOP/s, of a device as ``torch.cuda.get_device_name`` calls it ("NVIDIA H100 80GB HBM3").

    None if it is not known for sure: CPUs, other accelerators, and MIG slices, which are a part of the device they name.
    """
    words = set(re.split(r"[\s\-_/]+", device_name.upper()))
    if "MIG" in words:
        return None
    for required, peak in _PEAK_TFLOPS:
        if words.issuperset(required):
            return peak
    return None


class StepTimer:
    """Times one optimizer step after another on one rank and gives the ``time/`` part of its record.

    A step lasts from one call of :meth:`finish` to the next, so that nothing between two steps goes uncounted; work that is
    no part of a step (validation, samples, checkpoints) is followed by :meth:`restart`.
    """

    def __init__(
        self,
        world_size: int,
        peak_tflops: float | None,
        clock: Callable[[], float] = time.perf_counter,
        communication: Callable[[], float] | None = None,
    ) -> None:
        """``communication`` gives the seconds of it since its last call, if it is timed."""
        self.world_size = world_size
        self.peak_tflops = peak_tflops
        self._clock, self._communication = clock, communication
        self.restart()

    def restart(self) -> None:
        """The next step starts now."""
        self._start = self._clock()
        self._data_wait = 0.0
        if self._communication is not None:
            self._communication()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting for the data path."""
        start = self._clock()
        yield
        self._data_wait += self._clock() - start

    def finish(self, num_tokens: int, flops: float) -> dict[str, float | None]:
        """The step is over (on CUDA: after the loss has been read, or the kernels are still running).

        ``num_tokens`` and ``flops`` (model FLOPs, forward and backward) are of the whole step, over all ranks. MFU is a
        fraction, None where the peak is not known.
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
