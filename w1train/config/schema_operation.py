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


@dataclass(slots=True, kw_only=True)
class HealthConfig:
    """What is done about what goes wrong; all of it on by default (docs/health.md)."""

    on_nonfinite: Literal["skip", "stop"] = "skip"
    """A loss or gradient norm that is no number, twice for the same batch: skip = leave the batch out; stop = end the run."""
    max_skips: int = 3
    """As many steps in a row may be left out for non-finite values; one more, and the run goes back to its newest checkpoint."""
    max_rewinds: int = 1
    """How often a start of the run may go back to a checkpoint before it stops."""
    check_local_gradients: bool = True
    """Look at each rank's own gradients before they are added up, so that a non-finite one has a rank's name: one more read of the
    gradient buffer a step."""
    spike_sigma: float | None = 6.0
    """A step whose masked cross-entropy is so many standard deviations above the median of the last spike_window is left out;
    null = never."""
    spike_gradient_sigma: float | None = 12.0
    """The same of the logarithm of the gradient norm, which has long tails; null = never."""
    spike_window: int = 128
    """Steps that spikes are compared with; nothing is a spike before half of them are there, in each stage anew."""
    heartbeat_interval: float = 10.0
    """Seconds between heartbeats of a rank."""
    hang_timeout: float = 600.0
    """Seconds without progress on a rank after which all of them write their stacks and end."""
    start_timeout: float = 3600.0
    """The same before the first step, where data are copied and packed and checkpoints read."""
    stop_timeout: float = 100.0
    """Seconds after SIGTERM or SIGUSR1 for finishing the step and saving; then the process ends as it is."""
    straggler_interval: int = 100
    """Steps between measurements of how long ranks wait for the slowest; 0 = never."""
    straggler_share: float = 0.1
    """A warning names the slowest rank if the others have waited longer than this share of a step three times in a row."""
    gc_interval: int = 100
    """Steps between garbage collections, at the same step on all ranks; 0 = whenever Python thinks fit."""
