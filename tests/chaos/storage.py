"""Faults of object storage: the run's own checkpoints are lost or damaged, and the copies are in storage that fails, lies or is slow."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any

from tests.chaos.jobs import WORLD_SIZE
from tests.chaos.scene import CHECKPOINT_INTERVAL, Scene, until
from tests.end_to_end.runs import Sabotage
from tests.faulty_storage import create, set_faults
from w1train.checkpoints.manifest import CheckpointError
from w1train.checkpoints.remote.remote_checkpoints import MARKER
from w1train.checkpoints.verification import verify_checkpoint
from w1train.runtime import object_storage

_PASSING = ("OSError", "TimeoutError", "FSTimeoutError", "ClientError", "HttpError", "ClientConnectionError")
_SLOW_SECONDS = 0.05
"""Of each put and get: a checkpoint has seven files."""
_NO_MANIFESTS = ("", "not JSON", "[]", '{"step": 4, "files": 7}', '{"files": {"../../config.yaml": {"size": 1, "sha256": ""}}}')


def upload_hook(scene: Scene) -> Sabotage:
    """The storage is made, and the attempts after a failure are made at once: a campaign has no minutes to wait."""
    create(scene.bucket)

    def sabotage(_rank: int) -> None:
        object_storage.retry_seconds = 0.02

    return sabotage


def remote_steps(scene: Scene) -> list[int]:
    """Steps of the copies that are complete and good, ascending."""
    found = []
    for path in sorted(scene.bucket.glob("step_*")):
        try:
            verify_checkpoint(path)
            found.append(int(path.name.removeprefix("step_")))
        except (CheckpointError, OSError):  # it is being sent or removed at this moment
            continue
    return found


def fail(scene: Scene) -> Iterator[None]:
    """A part of all puts fails; then everything here is lost, and a part of all that the restart asks for fails, less often of each kind
    than the product makes attempts: no start may end with it."""
    random = scene.random
    share, error, seed = random.choice([0.3, 0.5]), random.choice(_PASSING), random.randrange(1000)
    slow = random.choice([0.0, _SLOW_SECONDS])
    scene.notes.append(f"{error} in {share:.0%} of puts, {slow} s slow")
    set_faults(scene.bucket, failing={"put": share}, error=error, seed=seed, slow_seconds=slow)
    yield from scene.moment(first=CHECKPOINT_INTERVAL + 1)
    yield from until(lambda: bool(scene.pids) and bool(remote_steps(scene)))
    _lose(scene, random.choice(["checkpoints", "run", "damage"]))
    kinds = {"get": share, "list": share, "info": share, "put": share}
    set_faults(scene.bucket, failing=kinds, num_failures=object_storage.ATTEMPTS - 1, error=error, seed=seed, slow_seconds=slow)


def lie(scene: Scene) -> Iterator[None]:
    """The copies are not what the storage says, or it says that there are none."""
    yield from scene.moment(first=2 * CHECKPOINT_INTERVAL + 1)
    yield from until(lambda: bool(scene.pids) and len(remote_steps(scene)) >= 2)
    kind = scene.random.choice(["manifest", "gone", "shard", "invented", "stale", "empty"])
    _lose(scene, scene.random.choice(["checkpoints", "run", "damage"]) if kind != "empty" else "checkpoints")
    *_, older, newest = remote_steps(scene)
    set_faults(scene.bucket, slow_seconds=scene.random.choice([0.0, _SLOW_SECONDS]), **_lies(scene, kind, newest))
    assert scene.blow is not None
    if kind in ("manifest", "gone", "shard"):
        scene.blow.saved = older
        scene.evidence = rf"the copy of step {newest} in .* is not used"
    if kind == "stale" and str(newest) not in (scene.bucket / MARKER).read_text():
        scene.blow.saved = older  # killed between the copy and its marker: nothing that can be read tells of it
    scene.notes.append(f"{kind} of step {newest}")
    job, num_resumes = scene.job, _num_resumes(scene)
    yield from until(lambda: scene.job is not job)
    if kind == "empty":
        scene.evidence = r"has no checkpoint, but .* says that this run has saved some"
        job = scene.job
        yield from until(lambda: scene.job is not job or "has saved some" in (job.log() if job is not None else ""))
    else:
        yield from until(lambda: _num_resumes(scene) > num_resumes)
    set_faults(scene.bucket)


def _lies(scene: Scene, kind: str, newest: int) -> dict[str, Any]:
    name = f"step_{newest:010d}"
    return {
        "manifest": {"contents": {f"{name}/manifest.json": scene.random.choice(_NO_MANIFESTS)}},
        "gone": {"gone": [f"{name}/*"]},
        "shard": {"gone": [f"{name}/rank_{scene.random.randrange(WORLD_SIZE):05d}.shards"]},
        "invented": {"invented": ["step_0000000099", "step_x", "latest"]},
        "stale": {"omitted": [name]},
        "empty": {"omitted": ["*"], "gone": ["*"]},
    }[kind]


def _lose(scene: Scene, what: str) -> None:
    """All ranks die, and what is here is lost before they come back."""
    scene.strike()
    scene.signal(signal.SIGKILL, list(range(WORLD_SIZE)))
    while scene.pids:  # without letting the supervisor start the next ones
        time.sleep(0.001)
    scene.notes.append(f"lost: {what}")
    if what == "damage":
        for path in scene.run.checkpoints.glob("step_*"):
            (path / "manifest.json").write_text("{}")
    else:
        shutil.rmtree(scene.run.path if what == "run" else scene.run.checkpoints)
    assert scene.blow is not None
    scene.blow.saved = max(remote_steps(scene))
    scene.has_lost_records = what == "run"


def _num_resumes(scene: Scene) -> int:
    path = scene.run.path / "events.jsonl"
    return path.read_text().count('"event":"resume"') if path.exists() else 0
