"""Starts a training, lets its fault happen, and starts it again as often as a launcher would, until it has ended or its time is over."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.chaos.jobs import Job
from tests.chaos.scene import Scene

POLL_SECONDS = 0.004
MAX_STARTS = 6
_BEGINS_AT = re.compile(r"^ +steps +(\d+) of \d+ done", re.MULTILINE)
"""What rank 0 says of a start before its first step."""


@dataclass(slots=True)
class Story:
    """What became of a run."""

    endings: list[list[int]] = field(default_factory=list)
    """Exit statuses by rank of each start; of torchrun, its own."""
    num_starts: int = 0
    """Ranks were started so often, by us or by torchrun."""
    resumed_at: int | None = None
    """The step that the first start after the blow went on from."""
    lost: int = 0
    """Recorded steps that were done again, over all restarts."""
    recovery_seconds: float | None = None
    """From the blow until a step was done that had not been done before (or the run had ended), the restarts included."""
    hung: bool = False
    """Its time was over; everything was killed."""
    log: str = ""
    """Of all ranks, over all starts."""


def supervise(start: Callable[[int], Job], scene: Scene, fault: Iterator[None], timeout: float) -> Story:
    """Run to the end.

    Args:
        start: starts the ranks, given how often that has been done.
        timeout: seconds for all of it.
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
        begun_at = [int(step) for step in _BEGINS_AT.findall(log)]
        if job.num_starts > 1 and scene.blow is not None and begun_at:
            _count_loss(story, begun_at[-1], scene.blow.reached)  # torchrun's restarts, all in one log
        elif story.endings and begun_at:  # a start that is killed early says nothing
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
    """One start to its end; None if the time was over first."""
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
    """What was done after the blow was the last that ranks did before they died of it."""
    if scene.blow is not None:
        scene.recovered_at = None
        scene.blow.reached = max(scene.blow.reached, reached)


def _count_loss(story: Story, resumed: int, reached: int) -> None:
    """A start goes on from the step ``resumed``, though ``reached`` was recorded before."""
    if story.resumed_at is None:
        story.resumed_at = resumed
    story.lost += max(0, reached - resumed)
