"""Draws the runs of a campaign and goes through them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.disk import small_disk
from tests.chaos.faults import FAULTS, Fault, nan_hook
from tests.chaos.jobs import ForkedJob, Job, TorchrunJob
from tests.chaos.scene import CHECKPOINT_INTERVAL, LAYOUTS, NUM_STEPS, Scene
from tests.chaos.supervisor import Story, supervise
from tests.chaos.verdict import problems
from tests.end_to_end.runs import BATCH, LENGTH, Sabotage, TinyRun, launch, make_data, output_to
from w1train.config.compose import load_config

RECOVERY_BOUND = 60.0
"""Seconds from a blow to the first step not done before; of torchrun's runs, whose ranks import everything anew, twice that."""
TIMEOUT = 150.0
"""Seconds for a whole run."""
_OVERRIDES = (
    f"schedule.stages.stable.tokens={(NUM_STEPS - 2) * BATCH * LENGTH}",
    f"checkpoint.interval={CHECKPOINT_INTERVAL}",
    "checkpoint.keep=3",
    "health.hang_timeout=6",
    "health.start_timeout=15",
    "health.stop_timeout=15",
    "health.heartbeat_interval=0.5",
)
_UNDISTURBED = Fault(name="none", title="nothing", strike=lambda scene: iter(()), max_restarts=0)


@dataclass(slots=True)
class Result:
    """What became of one run of the campaign."""

    number: int
    fault: Fault
    layout: str
    story: Story
    step: int
    """The newest recorded step when the fault struck."""
    notes: list[str]
    problems: list[str]

    def line(self) -> str:
        """For the console."""
        head = f"{self.number:3}  {self.fault.name:10} {self.layout:8}"
        if self.problems:
            return f"{head} FAILED ({'; '.join(self.notes)}): " + "; ".join(self.problems)
        story = self.story
        recovered = f"step {self.step:2}: recovered in {story.recovery_seconds:5.1f} s"
        return f"{head} {recovered}, {story.num_starts - 1} restarts, {story.lost} steps redone"


@dataclass(slots=True)
class Campaign:
    """A directory with the data, the undisturbed runs, and the disturbed ones while they last."""

    directory: Path
    seed: int
    overrides: Sequence[str] = ()
    """On every run's command line."""
    _expected: dict[tuple[str, bool], TinyRun] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data.mkdir(parents=True)
        # In a process of its own: the tokenizer's threads would make forking from this one unsafe.
        assert launch(1, self._make_data) == [0], (self.data / "log").read_text()
        load_config(["recipe=tiny"], [str(self.data / "recipes")])  # composed here for all ranks

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def _make_data(self, rank: int) -> int:
        with output_to(self.data / "log"):
            make_data(self.data)
        return 0

    def run(self, number: int, fault: Fault, layout: str) -> Result:
        """One run, its fault drawn from the seed and its number; what it leaves is removed if it survived."""
        expected = self.expected(layout, fault.skips)
        scene = self._scene(f"{number:03}-{fault.name}-{layout}", layout, f"{self.seed}/{number}")
        with small_disk(scene.run.runs_dir) if fault.small_disk else nullcontext():
            story = self._supervise(scene, fault, fault.hook(scene) if fault.hook is not None else None)
            bound = RECOVERY_BOUND * (2 if fault.torchrun else 1)
            found = problems(fault, scene, story, expected, bound)
            if found and scene.run.runs_dir.is_mount():
                shutil.copytree(scene.run.runs_dir, scene.marks / "runs", ignore=shutil.ignore_patterns("ballast"))
        step = scene.blow.reached if scene.blow is not None else 0
        if not found:
            shutil.rmtree(scene.marks.parent)
        return Result(number, fault, layout, story, step, scene.notes, found)

    def expected(self, layout: str, skips: bool) -> TinyRun:
        """The run of this layout that nothing happens to, or that a NaN, on another rank than first, makes skip a step; made once."""
        if (layout, skips) not in self._expected:
            scene = self._scene(f"expected-{layout}{'-skips' if skips else ''}", layout, f"{self.seed}/{layout}")
            story = self._supervise(scene, _UNDISTURBED, nan_hook(scene, once=False) if skips else None)
            assert story.endings == [[0, 0]], f"the undisturbed run ended with {story.endings}\n{story.log}"
            self._expected[layout, skips] = scene.run
        return self._expected[layout, skips]

    def _scene(self, name: str, layout: str, seed: str) -> Scene:
        directory = self.directory / name
        (directory / "marks").mkdir(parents=True)
        nan_step = random.Random(f"{self.seed}/{layout}").randint(3, NUM_STEPS - 8)
        return Scene(TinyRun(self.data, directory / "runs"), layout, directory / "marks", random.Random(seed), nan_step)

    def _supervise(self, scene: Scene, fault: Fault, hook: Sabotage | None) -> Story:
        arguments = scene.run.arguments(*_OVERRIDES, *LAYOUTS[scene.layout], *self.overrides, *fault.overrides)

        def start(number: int) -> Job:
            logs = scene.marks / f"start-{number}"
            if fault.torchrun:
                return TorchrunJob(arguments, self.data, logs)
            return ForkedJob(arguments, self.data, logs, hook)

        return supervise(start, scene, fault.strike(scene), TIMEOUT * (2 if fault.torchrun else 1))


def draw(num_runs: int, only: Sequence[str] = ()) -> Iterator[tuple[int, Fault, str]]:
    """(number, fault, layout) of each run: the faults in turn, the layouts in turn, so that every fault meets every layout."""
    chosen = [fault for fault in FAULTS if not only or fault.name in only]
    layouts = list(LAYOUTS)
    for number in range(num_runs):
        turn = number // len(chosen) + number % len(chosen)
        yield number, chosen[number % len(chosen)], layouts[turn % len(layouts)]
