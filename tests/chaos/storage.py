"""Faults of object storage: the run's own checkpoints are lost or damaged, and the storage with the copies fails, is wrong or is slow."""

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
"""The seconds of each put and get. A checkpoint has seven files."""
_NO_MANIFESTS = ("", "not JSON", "[]", '{"step": 4, "files": 7}', '{"files": {"../../config.yaml": {"size": 1, "sha256": ""}}}')


def upload_hook(scene: Scene) -> Sabotage:
    """Make the storage, and return a hook that repeats failed attempts almost at once, because a campaign cannot wait for minutes."""
    create(scene.bucket)

    def sabotage(_rank: int) -> None:
        object_storage.retry_seconds = 0.02

    return sabotage


def remote_steps(scene: Scene) -> list[int]:
    """Return the steps of the copies that are complete and good, ascending."""
    found = []
    for path in sorted(scene.bucket.glob("step_*")):
        try:
            verify_checkpoint(path)
            found.append(int(path.name.removeprefix("step_")))
        except (CheckpointError, OSError):  # it is being uploaded or removed at this moment
            continue
    return found


def fail(scene: Scene) -> Iterator[None]:
    """Let a share of all puts fail. Then lose the run's own files, and let a share of the restart's requests fail, fewer of each kind than
    w1train makes attempts, so that no start may fail."""
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
    """Let the storage list or return other copies than it has, or none."""
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
        scene.evidence = r"has no checkpoint, but .* says that this run has saved checkpoints"
        job = scene.job
        yield from until(lambda: scene.job is not job or "has saved checkpoints" in (job.log() if job is not None else ""))
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
    """Kill all ranks, and lose the run's own files before the ranks are started again."""
    scene.strike()
    scene.signal(signal.SIGKILL, list(range(WORLD_SIZE)))
    while scene.pids:  # without a yield, so that the supervisor does not start the next ranks
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
