"""The part of the configuration tree (w1train/config/schema.py) that says how a run is operated: what it saves, records and shows, and what
it does when something goes wrong. None of it changes what an undisturbed run computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from w1train.config.constraints import NonNegativeInteger, PathText, PositiveFloat, PositiveInteger, Range, Seconds

BestMetric = Literal["elbo", "masked_cross_entropy"]
UPLOAD_URL = "a URL that fsspec knows, such as s3://bucket/runs/NAME; or null"
"""What checkpoint.upload takes, in words."""


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """When state is saved and how much of it is kept."""

    interval: PositiveInteger = 1000
    """Steps between checkpoints; one more is written at the end."""
    keep: PositiveInteger = 3
    """Newest checkpoints kept."""
    keep_every: NonNegativeInteger = 0
    """Beside these, checkpoints of every so many steps are kept for ever; 0 = none are."""
    keep_best: NonNegativeInteger = 0
    """Beside the newest, as many of the best by checkpoint.best_metric are kept; every checkpoint must then be at a validation."""
    best_metric: BestMetric = "elbo"
    """What of the validation at a checkpoint's step ranks it; lower is better."""
    average_at_end: bool = False
    """Average the weights of the keep_best best checkpoints at the end of the run and of each of its phases, and compare the average
    with them (LLaDA2.0's merge; w1train.average does the same at any time). Averages are kept."""
    asynchronous: bool = True
    """Copy the state to host memory and write it while training goes on; false = training waits until it is written, and needs no memory
    for the copy."""
    on_error: Literal["warn", "stop"] = "warn"
    """What a save that fails (no space left, a quota) does to the run: warn = old checkpoints stay and training goes on, stop = it stops.
    The last save of a run must succeed either way."""
    verify: bool = True
    """Compare a checkpoint's files with their hashes before it is loaded; false = their sizes alone."""
    on_damage: Literal["fall_back", "stop"] = "fall_back"
    """What a start does about a damaged newest checkpoint: fall_back = set it aside and go on from the newest good one, stop = nothing."""
    resume_step: PositiveInteger | None = None
    """Go on from the checkpoint of this step; later ones are set aside. Obeyed once: the same command again goes on from the newest."""
    upload: Annotated[str, PathText(UPLOAD_URL)] | None = None
    """Where complete checkpoints are copied to in the background, such as s3://bucket/runs/NAME, under the same rules of what is kept. A
    start that has no good checkpoint of its own fetches the newest from there."""


@dataclass(slots=True, kw_only=True)
class LoggingConfig:
    """What is written while training."""

    interval: PositiveInteger = 10
    """Steps between console lines; metrics.jsonl has every step."""
    num_t_bins: Annotated[int, Range(1, 10_000)] = 10
    """Equal bins of t for the loss by t."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto = online if WANDB_API_KEY is set, else offline."""
    wandb_project: str = "w1train"
    """Weights & Biases project."""
    peak_tflops: PositiveFloat | None = None
    """Dense bf16 peak of the device for MFU, TFLOP/s; null = from the device's name (none on CPU)."""
    communication: bool = True
    """Time each step's gradient reduction and parameter gather (time/communication_seconds)."""
    tensorboard: bool = False
    """Write the same metrics and samples for TensorBoard, to tensorboard/ in the run directory (extra: tensorboard)."""


@dataclass(slots=True, kw_only=True)
class ProfilingConfig:
    """Which steps are looked into, and with what (docs/profiling.md)."""

    steps: list[PositiveInteger] = field(default_factory=list)
    """Steps to profile, counted from 1; each is slower than the others, and so are its times in metrics.jsonl."""
    ranks: list[NonNegativeInteger] = field(default_factory=lambda: [0])
    """Ranks that profile."""
    tool: Literal["torch", "nsys"] = "torch"
    """torch: PyTorch's profiler, traces and a table of time by part in profile/ of the run directory. nsys: NVTX ranges at every step, and
    the steps from the first to the last of profiling.steps marked for nsys profile --capture-range=cudaProfilerApi."""
    memory: bool = True
    """With torch, on GPUs: a snapshot of the allocator's memory for each profiled step."""


@dataclass(slots=True, kw_only=True)
class HealthConfig:
    """What is done about what goes wrong; all of it on by default (docs/health.md)."""

    on_nonfinite: Literal["skip", "stop"] = "skip"
    """A loss or gradient norm that is no number, twice for the same batch: skip = leave the batch out; stop = end the run."""
    max_skips: NonNegativeInteger = 3
    """As many steps in a row may be left out for non-finite values; one more, and the run goes back to its newest checkpoint."""
    max_rewinds: NonNegativeInteger = 1
    """How often a start of the run may go back to a checkpoint before it stops."""
    spike_sigma: PositiveFloat | None = 6.0
    """A step whose masked cross-entropy is so many standard deviations above the median of the last spike_window is left out;
    null = never."""
    spike_gradient_sigma: PositiveFloat | None = 12.0
    """The same of the logarithm of the gradient norm, which has long tails; null = never."""
    spike_window: Annotated[int, Range(2, 1 << 20)] = 128
    """Steps that spikes are compared with; nothing is a spike before half of them are there, in each stage anew."""
    heartbeat_interval: Seconds = 10.0
    """Seconds between heartbeats of a rank."""
    hang_timeout: Seconds = 600.0
    """Seconds without progress on a rank after which all of them write their stacks and end."""
    start_timeout: Seconds = 3600.0
    """The same before the first step, where data are copied and packed and checkpoints read."""
    stop_timeout: Seconds = 100.0
    """Seconds after SIGTERM or SIGUSR1 for finishing the step and saving; then the process ends as it is."""
    straggler_interval: NonNegativeInteger = 100
    """Steps between measurements of how long ranks wait for the slowest; 0 = never."""
    straggler_share: PositiveFloat = 0.1
    """A warning names the slowest rank if the others have waited longer than this share of a step three times in a row."""
    gc_interval: NonNegativeInteger = 100
    """Steps between garbage collections, at the same step on all ranks; 0 = whenever Python thinks fit."""
