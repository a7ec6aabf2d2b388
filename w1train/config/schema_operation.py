"""The part of the configuration tree (w1train/config/schema.py) that says how a run is operated: what it saves, records and shows, and what
it does when something goes wrong. None of it changes what an undisturbed run computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

BestMetric = Literal["elbo", "masked_cross_entropy"]


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """When state is saved and how much of it is kept."""

    interval: int = 1000
    """Steps between checkpoints; one more is written at the end."""
    keep: int = 3
    """Newest checkpoints kept."""
    keep_best: int = 0
    """Beside the newest, as many of the best by checkpoint.best_metric are kept; every checkpoint must then be at a validation."""
    best_metric: BestMetric = "elbo"
    """What of the validation at a checkpoint's step ranks it; lower is better."""
    average_at_end: bool = False
    """Average the weights of the keep_best best checkpoints at the end of the run and of each of its phases, and compare the average
    with them (LLaDA2.0's merge; w1train.average does the same at any time). Averages are kept."""


@dataclass(slots=True, kw_only=True)
class LoggingConfig:
    """What is written while training."""

    interval: int = 10
    """Steps between console lines; metrics.jsonl has every step."""
    num_t_bins: int = 10
    """Equal bins of t for the loss by t."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto = online if WANDB_API_KEY is set, else offline."""
    wandb_project: str = "w1train"
    """Weights & Biases project."""
    peak_tflops: float | None = None
    """Dense bf16 peak of the device for MFU, TFLOP/s; null = from the device's name (none on CPU)."""
    communication: bool = True
    """Time each step's gradient reduction and parameter gather (time/communication_seconds)."""
    tensorboard: bool = False
    """Write the same metrics and samples for TensorBoard, to tensorboard/ in the run directory (extra: tensorboard)."""


@dataclass(slots=True, kw_only=True)
class ProfilingConfig:
    """Which steps are looked into, and with what (docs/profiling.md)."""

    steps: list[int] = field(default_factory=list)
    """Steps to profile, counted from 1; each is slower than the others, and so are its times in metrics.jsonl."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that profile."""
    tool: Literal["torch", "nsys"] = "torch"
    """torch: PyTorch's profiler, traces and a table of time by part in profile/ of the run directory. nsys: NVTX ranges at every step, and
    the steps from the first to the last of profiling.steps marked for nsys profile --capture-range=cudaProfilerApi."""
    memory: bool = True
    """With torch, on GPUs: a snapshot of the allocator's memory for each profiled step."""
