"""The campaign: which runs it has, and how each of them is made and judged."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.chaos.disk import small_disk
from tests.chaos.faults import FAULTS, Fault, nan_hook
from tests.chaos.hooks import stop_at
from tests.chaos.jobs import ForkedJob, Job, TorchrunJob
from tests.chaos.replies import make_replies
from tests.chaos.scene import CHECKPOINT_INTERVAL, HANG_SECONDS, LAYOUTS, NUM_PHASES, NUM_STEPS, START, Scene, has_pairs
from tests.chaos.supervisor import Story, supervise
from tests.chaos.verdict import problems
from tests.end_to_end.runs import BATCH, LENGTH, Sabotage, TinyRun, launch, make_data, output_to
from tests.faulty_storage import PROTOCOL
from tests.made_pairs import write_pairs
from w1train.config.compose import load_config

TIMEOUT = 900.0
"""The longest time of a whole run in seconds. A run takes some seconds; one that needs more hangs, and no watchdog has noticed it. No other
limit depends on the machine's speed."""
_STEP_TOKENS = BATCH * LENGTH
_OVERRIDES = (f"checkpoint.interval={CHECKPOINT_INTERVAL}", "checkpoint.keep=3", "health.heartbeat_interval=0.5")
_STEPS = (f"schedule.stages.stable.tokens={(NUM_STEPS - 2) * _STEP_TOKENS}",)


def _phases(layout: str) -> tuple[str, ...]:
    """Return the command line of a run of three phases, of which the first is autoregressive or, for preferences, has another beta."""
    first = "preference_beta: 0.1" if has_pairs(layout) else "objective: autoregressive"
    objectives = {"next": first, "blocks": "block_size: 4", "whole": f"block_size: {LENGTH}"}
    stages = (
        f"schedule.stages.{name}={{tokens: {NUM_STEPS // NUM_PHASES * _STEP_TOKENS}, learning_rate: 0.01, diffusion: {{{objective}}}}}"
        for name, objective in objectives.items()
    )
    best = ("checkpoint.keep_best=2", "checkpoint.average_at_end=true")
    return ("~schedule.stages.warmup", "~schedule.stages.stable", *stages, *best)


_SHORT_LIMITS = (f"health.hang_timeout={HANG_SECONDS}", "health.start_timeout=40", "health.stop_timeout=60")
_LONG_LIMITS = ("health.hang_timeout=120", "health.start_timeout=120", "health.stop_timeout=120")
_UNDISTURBED = Fault(name="none", title="nothing", strike=lambda scene: iter(()), max_restarts=0)


@dataclass(slots=True)
class Result:
    """The result of one run of the campaign."""

    number: int
    fault: Fault
    layout: str
    story: Story
    step: int
    """The newest recorded step when the fault struck."""
    notes: list[str]
    problems: list[str]
    load: float
    """The machine's load average over the last minute of the run."""

    def line(self) -> str:
        """Return a line about the run for the console."""
        head = f"{self.number:3}  {self.fault.name:12} {self.layout:16}"
        if self.problems:
            return f"{head} FAILED ({'; '.join(self.notes)}): " + "; ".join(self.problems)
        story = self.story
        recovered = f"step {self.step:2}: recovered in {story.recovery_seconds:5.1f} s"
        return f"{head} {recovered}, {story.num_starts - 1} restarts, {story.lost} steps redone"


@dataclass(slots=True)
class Campaign:
    """A directory with the data, the undisturbed runs, and the current disturbed run."""

    directory: Path
    seed: int
    overrides: Sequence[str] = ()
    """Overrides of every run."""
    _expected: dict[str, TinyRun] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data.mkdir(parents=True)
        # In a process of its own: the tokenizer's threads would make forking from this one unsafe.
        assert launch(1, self._make_data) == [0], (self.data / "log").read_text()
        load_config(["recipe=tiny"], [str(self.data / "recipes")])  # composed once, before ranks are forked
        TinyRun(self.data, self.data / START).train("--max-steps", "1").require(0)

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def _make_data(self, rank: int) -> int:
        with output_to(self.data / "log"):
            make_data(self.data)
            make_replies(self.data)
            for name, num_pairs, seed in (("pairs", 60, 3), ("pairs_validation", 8, 4)):
                write_pairs(self.data / name, self.data / "tokenizer.json", num_pairs, seed)
        return 0

    def run(self, number: int, fault: Fault, layout: str) -> Result:
        """Make one run, whose fault is drawn from the seed and the run's number. Its files are removed if it recovered."""
        scene = self._scene(f"{number:03}-{fault.name}-{layout}", layout, f"{self.seed}/{number}")
        with small_disk(scene.run.runs_dir) if fault.small_disk else nullcontext():
            story = self._supervise(scene, fault, fault.hook(scene) if fault.hook is not None else None)
            found = problems(fault, scene, story, self._expected_run(fault, scene, story))
            if found and scene.run.runs_dir.is_mount():
                shutil.copytree(scene.run.runs_dir, scene.marks / "runs", ignore=shutil.ignore_patterns("ballast"))
        step = scene.blow.reached if scene.blow is not None else 0
        if not found:
            shutil.rmtree(scene.marks.parent)
        return Result(number, fault, layout, story, step, scene.notes, found, os.getloadavg()[0])

    def _expected_run(self, fault: Fault, scene: Scene, story: Story) -> TinyRun:
        """Return the undisturbed run that a disturbed run must be equal to."""
        if scene.next_layout and story.resumed_at:
            return self._changed(scene.layout, scene.next_layout, story.resumed_at)
        return self._straight(scene.next_layout or scene.layout, phases=fault.phases, skips=fault.skips)

    def _straight(self, layout: str, *, phases: bool, skips: bool) -> TinyRun:
        """Return the undisturbed run of a layout, or the run that skips a step for a NaN on a rank other than the first. Made once."""
        name = f"expected-{layout}{'-phases' if phases else ''}{'-skips' if skips else ''}"
        if name not in self._expected:
            scene = self._scene(name, layout, f"{self.seed}/{layout}")
            story = self._supervise(scene, replace(_UNDISTURBED, phases=phases), nan_hook(scene, once=False) if skips else None)
            assert story.endings == [[0, 0]], f"the undisturbed run ended with {story.endings}\n{story.log}"
            self._expected[name] = scene.run
        return self._expected[name]

    def _changed(self, layout: str, next_layout: str, step: int) -> TinyRun:
        """Return the run that is stopped at this step and resumed under the other layout. Made once."""
        name = f"expected-{layout}-{step}-{next_layout}"
        if name not in self._expected:
            scene = self._scene(name, layout, name)
            scene.next_layout = next_layout
            story = self._supervise(scene, replace(_UNDISTURBED, changes_layout=True), stop_at(step))
            assert story.endings == [[75, 75], [0, 0]], f"the run that changes its layout ended with {story.endings}\n{story.log}"
            self._expected[name] = scene.run
        return self._expected[name]

    def _scene(self, name: str, layout: str, seed: str) -> Scene:
        directory = self.directory / name
        (directory / "marks").mkdir(parents=True)
        nan_step = random.Random(f"{self.seed}/{layout}").randint(3, NUM_STEPS - 8)
        return Scene(TinyRun(self.data, directory / "runs"), layout, directory / "marks", random.Random(seed), nan_step)

    def _supervise(self, scene: Scene, fault: Fault, hook: Sabotage | None) -> Story:
        def start(number: int) -> Job:
            layout = scene.next_layout if fault.changes_layout and number > 0 else scene.layout
            limits = _SHORT_LIMITS if fault.is_hang and number == 0 else _LONG_LIMITS
            steps = _phases(layout) if fault.phases else _STEPS
            arguments = scene.run.arguments(*_OVERRIDES, *steps, *limits, *LAYOUTS[layout], *self.overrides, *fault.overrides)
            if fault.uploads:
                arguments.append(f"checkpoint.upload={PROTOCOL}://{scene.bucket}")
            logs = scene.marks / f"start-{number}"
            if fault.torchrun:
                return TorchrunJob(arguments, self.data, logs)
            return ForkedJob(arguments, self.data, logs, hook)

        return supervise(start, scene, fault.strike(scene), TIMEOUT)


def draw(num_runs: int, only: Sequence[str] = ()) -> Iterator[tuple[int, Fault, str]]:
    """Yield the number, fault and layout of each run. Faults and layouts take turns, so that every fault meets every layout."""
    chosen = [fault for fault in FAULTS if not only or fault.name in only]
    layouts = list(LAYOUTS)
    for number in range(num_runs):
        turn = number // len(chosen) + number % len(chosen)
        yield number, chosen[number % len(chosen)], layouts[turn % len(layouts)]
