"""The verdict on a run: did it end as if nothing had happened?"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import torch

from tests.chaos.faults import Fault
from tests.chaos.scene import NUM_STEPS, Scene
from tests.chaos.storage import remote_steps
from tests.chaos.supervisor import Story
from tests.end_to_end.runs import TinyRun
from w1train.checkpoints.format.shard_reader import Shards

MEASURED = ("time/", "checkpoint/", "health/slowest_rank", "health/rank_spread")
"""Beginnings of the names of metrics that a clock measures. All other metrics must be those of the undisturbed run, bit for bit."""


def records(run: TinyRun) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without metrics that a clock measures, and without the gradient norm of skipped steps: whether a
    NaN is in the norm depends on its place (megatron-core counts only the first tensor-parallel rank's copy of a parameter)."""
    found = []
    for record in run.metrics():
        left_out = ("grad_norm", "nonfinite") if "skipped" in record else ()
        found.append({key: value for key, value in record.items() if not key.startswith(MEASURED) and key not in left_out})
    return found


def state(run: TinyRun) -> dict[str, str]:
    """Return the SHA-256 of every shard of the last checkpoint, by tensor and place: weights, master weights and moments."""
    last = run.checkpoints / f"step_{NUM_STEPS:010d}"
    if not (last / "manifest.json").is_file():
        return {}
    shards, hashes = Shards(last), {}
    for key, tensor in shards.tensors.items():
        for shard in tensor.shards:
            content = shards.read(key, shard).view(-1).view(torch.uint8)
            hashes[f"{key} at {shard.offset}"] = hashlib.sha256(content.numpy()).hexdigest()
    return hashes


def problems(fault: Fault, scene: Scene, story: Story, expected: TinyRun) -> list[str]:
    """Return the problems of a run, or an empty list if it recovered. They do not depend on the speed of the machine.

    Args:
        expected: the run that it must be equal to.
    """
    if story.hung:
        return [f"it hung: ranks {sorted(scene.pids) or 'none'} were left at step {scene.newest_step()}"]
    if scene.blow is None:
        return [f"the fault never came: statuses {story.endings}"]
    since = story.resumed_at if scene.has_lost_records else None
    found = [*_story_problems(fault, scene, story), *_result_problems(scene, expected, since)]
    return [*found, *_upload_problems(scene, story)] if fault.uploads else found


def _story_problems(fault: Fault, scene: Scene, story: Story) -> list[str]:
    found = []
    assert scene.blow is not None
    *failed, last = story.endings
    if any(last):
        found.append(f"it did not end well: statuses {story.endings}")
    wrong = {status for ending in failed for status in ending} - fault.statuses - {0}
    if wrong:
        found.append(f"ranks ended with {sorted(wrong)}")
    if story.num_starts - 1 > fault.max_restarts:
        found.append(f"{story.num_starts - 1} restarts, {fault.max_restarts} expected: {story.endings}")
    if story.num_starts > 1 and story.resumed_at is None:
        found.append("no start after the first said at which step it begins")
    if story.resumed_at is not None and story.resumed_at < scene.blow.saved:
        found.append(f"it went on from step {story.resumed_at}, though the checkpoint of step {scene.blow.saved} was complete")
    return found + [f"nobody said {evidence!r}" for evidence in (fault.evidence, scene.evidence) if not re.search(evidence, story.log)]


def _upload_problems(scene: Scene, story: Story) -> list[str]:
    """Return a problem unless the newest checkpoint is in object storage at the end, or a rank has logged that it is not."""
    steps = remote_steps(scene)
    is_there = NUM_STEPS in steps or "could not be uploaded" in story.log
    return [] if is_there else [f"object storage has steps {steps}, and nobody said that the last one is not there"]


def _result_problems(scene: Scene, expected: TinyRun, since: int | None) -> list[str]:
    """Return the differences in the results. If ``since`` is given, only records of later steps are compared."""
    run, found = scene.run, []
    if difference := first_difference(records(run), [record for record in records(expected) if since is None or record["step"] > since]):
        found.append(difference)
    samples = [line for line in expected.samples().splitlines() if since is None or json.loads(line)["step"] > since]
    if run.samples().splitlines() != samples:
        found.append("samples.jsonl differs")
    ours, theirs = state(run), state(expected)
    if different := [name for name in theirs if ours.get(name) != theirs[name]]:
        found.append(f"{len(different)} of {len(theirs)} tensors of the last checkpoint differ, the first is {different[0]}")
    if left := [path.name for path in run.checkpoints.glob(".*")]:
        found.append(f"left behind: {', '.join(left)}")
    return found + negative_durations(run)


def negative_durations(run: TinyRun) -> list[str]:
    """Return the first negative duration in the records, which a clock that jumped may have caused."""
    found = []
    for file in ("metrics.jsonl", "events.jsonl"):
        for record in map(json.loads, (run.path / file).read_text().splitlines()):
            values = {key: value for key, value in record.items() if "seconds" in key and isinstance(value, int | float)}
            found += [f"{file}, step {record['step']}: {key} is {value}" for key, value in values.items() if value < 0]
    return found[:1]


def first_difference(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> str | None:
    """Describe the first record in which two runs differ, and its fields that differ."""
    for ours, theirs in zip(found, expected, strict=False):
        if ours != theirs:
            names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            values = "; ".join(f"{name} is {ours.get(name)}, expected {theirs.get(name)}" for name in names[:3])
            return f"metrics differ first at {theirs['kind']} step {theirs['step']}: {values}"
    if len(found) != len(expected):
        return f"{len(found)} records in metrics.jsonl, expected {len(expected)}"
    return None
