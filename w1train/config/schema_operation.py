"""The classes of the configuration tree (w1train/config/schema.py) for operating a run: what it saves, records and shows, and what it
does when something goes wrong. Their fields do not change what an undisturbed run computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from w1train.config.constraints import NonNegativeInteger, PathText, PositiveFloat, PositiveInteger, Range, Seconds

BestMetric = Literal["elbo", "masked_cross_entropy", "preference_accuracy"]
_HIGHER_IS_BETTER = ("preference_accuracy",)
UPLOAD_URL = "a URL that fsspec knows, such as s3://bucket/runs/NAME; or null"
"""What checkpoint.upload takes, in words."""


def cost(metric: str, score: float) -> float:
    """Return a score of a metric as a number of which lower is better."""
    return -score if metric in _HIGHER_IS_BETTER else score


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """Saving, keeping, loading and copying of checkpoints."""

    interval: PositiveInteger = 1000
    """Steps between checkpoints. A run also writes a checkpoint at its end."""
    keep: PositiveInteger = 3
    """Number of newest checkpoints that are kept."""
    keep_every: NonNegativeInteger = 0
    """Also keep every checkpoint whose step is a multiple of this number, without a limit; 0 = no further checkpoints are kept."""
    keep_best: NonNegativeInteger = 0
    """Also keep this many of the best checkpoints by checkpoint.best_metric; there must then be a validation at each checkpoint's step."""
    best_metric: BestMetric = "elbo"
    """Metric of the validation at a checkpoint's step that ranks the checkpoint; lower is better, but higher for preference_accuracy,
    which only runs with preferences have (docs/preferences.md)."""
    average_at_end: bool = False
    """At the end of the run and of each of its phases, average the weights of the keep_best best checkpoints and compare the average with
    them (LLaDA2.0's merge; `w1train average` does the same at any time). Averages are never removed."""
    asynchronous: bool = True
    """true: the state is copied to host memory and written while training goes on. false: training waits until the state is written, and
    needs no memory for the copy."""
    on_error: Literal["warn", "stop"] = "warn"
    """What happens when a save fails (no space left, a quota). warn: the old checkpoints stay and training goes on. stop: the run stops.
    The last save of a run must succeed in both cases."""
    verify: bool = True
    """Compare a checkpoint's files with their hashes before the checkpoint is loaded; false = compare only their sizes."""
    on_damage: Literal["fall_back", "stop"] = "fall_back"
    """What a start does when the newest checkpoint is damaged. fall_back: it renames that checkpoint and resumes from the newest good
    checkpoint. stop: it ends with an error."""
    resume_step: PositiveInteger | None = None
    """Resume from the checkpoint of this step, and rename later checkpoints. This happens once: the same command, given again, resumes
    from the newest checkpoint."""
    upload: Annotated[str, PathText(UPLOAD_URL)] | None = None
    """URL to which complete checkpoints are copied in the background, such as s3://bucket/runs/NAME; the rules for keeping checkpoints
    apply to the copies too. A start without a good local checkpoint fetches the newest copy from there."""


@dataclass(slots=True, kw_only=True)
class LoggingConfig:
    """Console, metrics and trackers."""

    interval: PositiveInteger = 10
    """Steps between lines on the console; metrics.jsonl has a line for every step."""
    num_t_bins: Annotated[int, Range(1, 10_000)] = 10
    """Number of equal bins of t in the metrics of the loss by t."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Mode of Weights & Biases; auto = online if WANDB_API_KEY is set, otherwise offline."""
    wandb_project: str = "w1train"
    """Project in Weights & Biases."""
    peak_tflops: PositiveFloat | None = None
    """Dense bf16 peak of the device in TFLOP/s, from which MFU is computed; null = the peak that belongs to the device's name (on the CPU
    there is no MFU)."""
    communication: bool = True
    """Measure the time of each step's gradient reduction and parameter gather (time/communication_seconds)."""
    tensorboard: bool = False
    """Also write metrics and samples for TensorBoard, to tensorboard/ in the run directory (needs the extra tensorboard)."""


@dataclass(slots=True, kw_only=True)
class ProfilingConfig:
    """Steps and ranks to profile, and the tool (docs/profiling.md)."""

    steps: list[PositiveInteger] = field(default_factory=list)
    """Steps to profile, counted from 1. A profiled step is slower than other steps, and its times in metrics.jsonl show this."""
    ranks: list[NonNegativeInteger] = field(default_factory=lambda: [0])
    """Ranks that profile."""
    tool: Literal["torch", "nsys"] = "torch"
    """torch: PyTorch's profiler writes traces and a table of the time of each part to profile/ in the run directory. nsys: every step has
    NVTX ranges, and the steps from the first to the last of profiling.steps are marked for
    nsys profile --capture-range=cudaProfilerApi."""
    memory: bool = True
    """With tool=torch, on GPUs: write a snapshot of the allocator's memory for each profiled step."""


@dataclass(slots=True, kw_only=True)
class HealthConfig:
    """Reactions to what goes wrong; every check is on by default (docs/health.md)."""

    on_nonfinite: Literal["skip", "stop"] = "skip"
    """What happens when the loss or the gradient norm is NaN or infinite twice for the same batch. skip: the batch is skipped. stop: the
    run ends."""
    max_skips: NonNegativeInteger = 3
    """Most steps in a row that may be skipped for NaN or infinite values; after one more, the run goes back to its newest checkpoint."""
    max_rewinds: NonNegativeInteger = 1
    """How often a run may go back to a checkpoint, counted from its last start, before it stops."""
    spike_sigma: PositiveFloat | None = 6.0
    """A step is skipped if its masked cross-entropy is more than this many standard deviations above the median of the last
    spike_window steps; null = never."""
    spike_gradient_sigma: PositiveFloat | None = 12.0
    """A step is skipped if the logarithm of its gradient norm, which has long tails, is more than this many standard deviations above the
    median of these steps; null = never."""
    spike_window: Annotated[int, Range(2, 1 << 20)] = 128
    """Number of earlier steps that a step is compared with. The comparison begins anew in each stage, and no step is a spike before half of
    this number of steps has been done."""
    heartbeat_interval: Seconds = 10.0
    """Seconds between heartbeats of a rank."""
    hang_timeout: Seconds = 600.0
    """Seconds without progress on a rank after which all ranks write their stacks and end."""
    start_timeout: Seconds = 3600.0
    """The same time limit before the first step, while data are copied and packed and checkpoints are read."""
    stop_timeout: Seconds = 100.0
    """Seconds that a process has, after SIGTERM or SIGUSR1, to finish the step and save; after this time it ends without saving."""
    straggler_interval: NonNegativeInteger = 100
    """Steps between measurements of how long ranks wait for the slowest rank; 0 = never."""
    straggler_share: PositiveFloat = 0.1
    """A warning names the slowest rank if the other ranks have waited for longer than this share of a step in three measurements in a
    row."""
    gc_interval: NonNegativeInteger = 100
    """Steps between garbage collections, which happen at the same step on all ranks; 0 = Python decides when."""
