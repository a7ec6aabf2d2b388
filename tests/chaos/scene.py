"""A run as seen from outside, and the record of the fault that strikes it."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.jobs import Job
from tests.end_to_end.runs import TinyRun

_EXPERTS = (
    "model.experts.num_experts=4",
    "model.experts.num_active=2",
    "model.experts.ffn_hidden_size=16",
    "model.experts.shared_ffn_hidden_size=16",
    "model.experts.num_dense_layers=1",
    "model.experts.score=sigmoid",
    "model.experts.has_bias=true",
    "parallel.expert=2",
)
_REPLIES = (
    "data.train=replies",
    "data.validation=replies_validation",
    "data.packing=best_fit",
    "data.align=4",
    "diffusion.block_size=4",
    "diffusion.timestep_per=document",
    "diffusion.weight=constant",
    "diffusion.normalizer=masked_tokens",
    "diffusion.random_length_probability=0",
    "diffusion.confidence_weight=2",
    "diffusion.confidence_temperature=0.5",
)
START = "start"
"""The directory, among the data, of the run that the layouts of pairs begin from."""
_PAIRS = (
    "data.train=pairs",
    "data.validation=pairs_validation",
    "data.packing=separate",
    "diffusion.preference_draws=2",
    "diffusion.random_length_probability=0",
    f"training.initial_weights={START}/tiny",
)
_FAMILIES = ("experts", "replies", "pairs")
LAYOUTS = {
    "tensor": ("parallel.tensor=2",),
    "pipeline": ("parallel.pipeline=2",),
    "data": (),
    "experts": _EXPERTS,
    "experts-tensor": ("parallel.tensor=2", "parallel.sequence=true", *_EXPERTS),
    "replies": _REPLIES,
    "replies-pipeline": ("parallel.pipeline=2", *_REPLIES),
    "pairs": _PAIRS,
    "pairs-tensor": ("parallel.tensor=2", "parallel.sequence=true", *_PAIRS),
}
"""Command line of each layout of two ranks. The layouts whose names begin with "experts" train a mixture of experts, whose balancing bias
moves at each step. Those whose names begin with "replies" train replies given prompts, with confidence, for which each step runs the model
twice. Those whose names begin with "pairs" train preferences, with a frozen reference."""
NUM_STEPS = 24
NUM_PHASES = 3
CHECKPOINT_INTERVAL = 4
HANG_SECONDS = 6
"""health.hang_timeout of a start whose watchdog is tested."""
LENGTH_OF_A_STEP = 0.1
"""About the seconds of a step. A random moment is at most this long after a step."""
SECONDS_TO_START = 1.0
"""About the seconds before the first step: reading the configuration, building the model, the first validation."""


def other_layouts(layout: str) -> list[str]:
    """Return the other layouts of the same model and data."""
    return [other for other in LAYOUTS if other != layout and _family(other) == _family(layout)]


def has_pairs(layout: str) -> bool:
    """Tell whether a layout trains preferences."""
    return _family(layout) == "pairs"


def _family(layout: str) -> str:
    return layout.partition("-")[0] if layout.startswith(_FAMILIES) else ""


@dataclass(slots=True)
class Blow:
    """The moment when a fault struck, and the state of the run then."""

    time: float
    """The moment by time.monotonic()."""
    reached: int
    """The newest recorded step."""
    saved: int
    """The step of the newest complete checkpoint, which a restart must find; 0 if there is none."""


@dataclass(slots=True)
class Scene:
    """The run that a fault strikes, and what the fault may see and change."""

    run: TinyRun
    layout: str
    marks: Path
    """A directory for the hooks' marks and the starts' logs, on another disk than the run's."""
    random: random.Random
    nan_step: int = 0
    """The step with a NaN that stays."""
    next_layout: str = ""
    """The layout of the starts after the first, if it is another one."""
    has_lost_records: bool = False
    """This flag tells whether the run's directory was lost with its records, so that only records from the restart on are compared."""
    job: Job | None = None
    """The ranks of the current start."""
    blow: Blow | None = None
    recovered_at: float | None = None
    evidence: str = ""
    """A regular expression for what the ranks must log because of this blow, in addition to the fault's own evidence."""
    _signature: tuple[int, ...] = ()
    _newest: int = 0
    notes: list[str] = field(default_factory=list)
    """What the fault did, in words, for the description of a failure."""

    # What can be seen

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return self.job.ranks() if self.job is not None else {}

    @property
    def bucket(self) -> Path:
        """The directory of the run's object storage."""
        return self.marks / "bucket"

    def newest_step(self) -> int:
        """Return the last training step in metrics.jsonl."""
        path = self.run.path / "metrics.jsonl"
        try:
            status = path.stat()
            signature = (status.st_ino, status.st_size, status.st_mtime_ns)
            if signature != self._signature:
                lines = path.read_bytes().splitlines(keepends=True)
                records = [json.loads(line) for line in lines if line.endswith(b"\n")]
                self._newest = max((record["step"] for record in records if record["kind"] == "train"), default=0)
                self._signature = signature
        except FileNotFoundError:
            self._newest = 0
        return self._newest

    def complete_checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, the oldest first."""
        return sorted(path for path in self.run.checkpoints.glob("step_*") if (path / "manifest.json").is_file())

    def newest_saved(self) -> int:
        """Return the step of the newest complete checkpoint, or 0 if there is none."""
        checkpoints = self.complete_checkpoints()
        return int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0

    def is_saving(self) -> bool:
        """Tell whether a checkpoint is being written at this moment."""
        return any(self.run.checkpoints.glob(".writing-step_*"))

    # What a fault does

    def moment(self, first: int = 0, last: int = NUM_STEPS - 6) -> Iterator[None]:
        """Wait for a random moment of the run: some time after a random step of these."""
        step = self.random.randint(first, last)
        yield from until(lambda: self.newest_step() >= step)
        delay = self.random.uniform(0.0, LENGTH_OF_A_STEP if step else SECONDS_TO_START)
        self.notes.append(f"{delay:.2f} s after step {step}")
        yield from after(delay)
        yield from until(lambda: bool(self.pids))

    def strike(self, when: float | None = None) -> None:
        """Note that the fault strikes now, or struck at a time of the monotonic clock."""
        self.blow = Blow(when or time.monotonic(), self.newest_step(), self.newest_saved())

    def signal(self, number: int, ranks: list[int]) -> None:
        """Send a signal to ranks that are there."""
        for rank in ranks:
            if rank in self.pids:
                os.kill(self.pids[rank], number)


def until(condition: Callable[[], bool]) -> Iterator[None]:
    """Wait for a condition in a fault, while the supervisor continues."""
    while not condition():
        yield


def after(seconds: float) -> Iterator[None]:
    """Wait for a time."""
    end = time.monotonic() + seconds
    yield from until(lambda: time.monotonic() >= end)
