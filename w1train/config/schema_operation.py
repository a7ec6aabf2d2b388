"""The part of the configuration tree (w1train/config/schema.py) that says how a run is operated: what it saves, records and shows, and what
it does when something goes wrong. None of it changes what an undisturbed run computes."""

from __future__ import annotations

from dataclasses import dataclass
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
