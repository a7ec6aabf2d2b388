from __future__ import annotations

import pytest

from w1train.profiling.throughput import StepTimer, device_peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H800", 989.5),
        ("NVIDIA H800 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A800-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA RTX A1000", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peaks_by_the_names_torch_gives(name, peak):
    assert device_peak_tflops(name) == peak


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_step_by_hand():
    clock = Clock()
    timer = StepTimer(world_size=4, peak_tflops=1000.0, clock=clock)
    clock.now += 7.0
    timer.restart()
    with timer.waiting_for_data():
        clock.now += 0.5
    clock.now += 1.5
    metrics = timer.finish(num_tokens=1000, flops=4e15)
    assert metrics == {
        "time/step_seconds": 2.0,
        "time/tokens_per_second": 500.0,
        "time/tflops_per_second": 500.0,
        "time/mfu": 0.5,
        "time/data_wait_seconds": 0.5,
    }
    clock.now += 1.0
    following = timer.finish(num_tokens=10, flops=1e12)
    assert (following["time/step_seconds"], following["time/data_wait_seconds"]) == (1.0, 0.0)


def test_no_peak_no_mfu():
    clock = Clock()
    timer = StepTimer(world_size=1, peak_tflops=None, clock=clock)
    clock.now += 1.0
    assert timer.finish(num_tokens=1, flops=1e12)["time/mfu"] is None
