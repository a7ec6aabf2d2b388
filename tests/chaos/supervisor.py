"""The supervisor of a run: it starts the training, lets the fault strike, and starts it again as a launcher would, until the run has
ended."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.chaos.jobs import Job
from tests.chaos.scene import Scene

POLL_SECONDS = 0.004
MAX_STARTS = 6
BEGINS_AT = re.compile(r"^ +begins +(?:at|resumes from) step (\d+)", re.MULTILINE)
"""What rank 0 logs about a start before its first step."""


@dataclass(slots=True)
class Story:
    """The events of a run."""

    endings: list[list[int]] = field(default_factory=list)
    """Exit statuses of each start by rank; for torchrun, its own status."""
    num_starts: int = 0
    """How often the ranks were started, by the supervisor or by torchrun."""
    resumed_at: int | None = None
    """The step that the first start after the blow resumed from."""
    lost: int = 0
    """The number of recorded steps that were trained again, over all restarts."""
    recovery_seconds: float | None = None
    """Seconds from the blow to the first step that had not been trained before (or to the end of the run), with the restarts."""
    hung: bool = False
    """This flag tells whether the run's time was over, so that all its processes were killed."""
    log: str = ""
    """The output of all ranks of all starts."""


def supervise(start: Callable[[int], Job], scene: Scene, fault: Iterator[None], timeout: float) -> Story:
    """Run a training to its end, with its fault and all restarts.

    Args:
        start: starts the ranks; its argument is the number of starts before.
        timeout: seconds for the whole run.
    """
    story, deadline = Story(), time.monotonic() + timeout
    reached = 0
    while len(story.endings) < MAX_STARTS and not story.hung:
        scene.job = job = start(len(story.endings))
        try:
            statuses = _watch(job, scene, fault, deadline)
        finally:
            job.kill()
        newest, log = scene.newest_step(), job.log()
        begun_at = [int(step) for step in BEGINS_AT.findall(log)]
        if job.num_starts > 1 and scene.blow is not None and begun_at:
            _count_loss(story, begun_at[-1], scene.blow.reached)  # torchrun's restarts, all in one log
        elif story.endings and begun_at:  # a start that is killed early logs nothing
            _count_loss(story, begun_at[0], reached)
        reached = max(reached, newest)
        story.log += log
        story.num_starts += job.num_starts
        story.hung = statuses is None
        story.endings.append(statuses or [])
        if statuses is not None and not any(statuses):
            break
        _not_recovered(scene, reached)
    if scene.blow is not None and not story.hung:
        story.recovery_seconds = (scene.recovered_at or time.monotonic()) - scene.blow.time
    return story


def _watch(job: Job, scene: Scene, fault: Iterator[None], deadline: float) -> list[int] | None:
    """Watch one start to its end, and return its statuses, or None if the time was over first."""
    num_starts = job.num_starts
    while time.monotonic() < deadline:
        next(fault, None)
        statuses = job.poll()
        newest = scene.newest_step()
        if job.num_starts > max(num_starts, 1):  # torchrun's restart
            num_starts = job.num_starts
            _not_recovered(scene, newest)
        if scene.blow is not None and scene.recovered_at is None and newest > scene.blow.reached:
            scene.recovered_at = time.monotonic()
        if statuses is not None:
            return statuses
        time.sleep(POLL_SECONDS)
    return None


def _not_recovered(scene: Scene, reached: int) -> None:
    """Note that the ranks had not recovered: the steps after the blow were the last ones before they died of it."""
    if scene.blow is not None:
        scene.recovered_at = None
        scene.blow.reached = max(scene.blow.reached, reached)


def _count_loss(story: Story, resumed: int, reached: int) -> None:
    """Count the steps that a start trains again, because it resumed at ``resumed`` although ``reached`` was recorded."""
    if story.resumed_at is None:
        story.resumed_at = resumed
    story.lost += max(0, reached - resumed)
