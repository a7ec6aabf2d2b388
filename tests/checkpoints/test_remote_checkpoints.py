"""What a start does with a storage that lies: the next older good copy, a tidy directory, and never step 0 in silence."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.distributed import run_distributed
from tests.faulty_storage import counts, create, set_faults
from tests.slow import examples
from w1train.checkpoints import recovery
from w1train.checkpoints.checkpoint_names import step_path
from w1train.checkpoints.manifest import CheckpointError, check_manifest, complete_steps
from w1train.checkpoints.recovery import choose_checkpoint
from w1train.checkpoints.remote.remote_checkpoints import MARKER, Marker, RemoteCheckpoints
from w1train.checkpoints.remote.uploader import Uploader
from w1train.checkpoints.verification import hash_files
from w1train.config.schema_operation import CheckpointConfig
from w1train.runtime import object_storage

STEPS = (3, 6, 9)
FILES = ("config.yaml", "rank_00000.shards", "rank_00001.shards")


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    """Copies have no tensors, so the step that is stored with them is not looked for."""
    monkeypatch.setattr(object_storage, "retry_seconds", 0.0)
    monkeypatch.setattr(recovery, "require_position", lambda path: None)


def make_checkpoint(directory: Path, step: int) -> Path:
    path = step_path(directory, step)
    path.mkdir(parents=True)
    for name in FILES:
        (path / name).write_text(f"{name} of step {step}")
    progress = {"step": step, "samples": 8 * step, "seconds": 1.0, "dataset": None, "validation": {"elbo": 1.0 / step}}
    (path / "manifest.json").write_text(json.dumps({**progress, "files": hash_files(path / name for name in FILES)}, indent=1))
    return path


def make_storage(directory: Path, steps: Sequence[int] = STEPS) -> str:
    """A storage with copies of these steps and the marker; its URL."""
    url = create(directory)
    for step in steps:
        make_checkpoint(directory, step)
        (directory / MARKER).write_text(json.dumps({"newest": step}))
    return url


def change(path: Path, act: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest."""
    manifest = json.loads(path.read_text())
    act(manifest)
    path.write_text(json.dumps(manifest))


def manifest_of(bucket: Path, step: int) -> Path:
    return step_path(bucket, step) / "manifest.json"


def rename_a_file(name: str) -> Callable[[dict[str, Any]], None]:
    def act(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop(FILES[0])

    return act


def set_entry(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["files"][FILES[1]].update(values)


HOSTILE_NAMES = ("../../outside", "/tmp/outside", "a/b", "..", ".", "", "manifest.json", "a\\b", "a\0b", "x" * 256, "a\nb")


def damages() -> dict[str, tuple[Callable[[Path], Any], str]]:
    """How the copy of step 9 is spoilt, and what is said of it."""

    def of_manifest(act: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
        return lambda bucket: change(manifest_of(bucket, 9), act)

    def of_text(text: str) -> Callable[[Path], Any]:
        return lambda bucket: manifest_of(bucket, 9).write_text(text)

    shard = f"step_{9:010d}/{FILES[1]}"
    return {
        "an empty manifest": (of_text(""), "cannot be read"),
        "garbage": (of_text("\x00{"), "cannot be read"),
        "a deep manifest": (of_text("[" * 100_000), "cannot be read"),
        "a list": (of_text("[]"), "cannot be read"),
        "files are a list": (of_manifest(lambda manifest: manifest.update(files=["a"])), "manifest.json says files: ['a']"),
        "incomplete": (of_manifest(lambda manifest: manifest.pop("samples")), "lacks samples"),
        "of another step": (of_manifest(lambda manifest: manifest.update(step=6)), "says that it is of step 6"),
        "no manifest": (lambda bucket: manifest_of(bucket, 9).unlink(), "has no manifest.json"),
        "an empty directory": (lambda bucket: [path.unlink() for path in step_path(bucket, 9).iterdir()], "has no manifest.json"),
        "a shard is gone": (lambda bucket: (bucket / shard).unlink(), "it is not there"),
        "a short shard": (lambda bucket: (bucket / shard).write_text("x"), "has 1 bytes, expected"),
        "a changed shard": (lambda bucket: (bucket / shard).write_text("y" * len(f"{FILES[1]} of step 9")), "SHA-256 differs"),
        "a shard that is cut off on the way": (lambda bucket: set_faults(bucket, contents={shard: "x"}), "1 bytes came, expected"),
        "a shard that is longer than it says": (lambda bucket: set_faults(bucket, contents={shard: "x" * 99}), "more than the expected"),
        "the listing shows what is gone": (lambda bucket: set_faults(bucket, gone=["step_0000000009*"]), "has no manifest.json"),
        "the listing invents": (
            lambda bucket: (shutil.rmtree(step_path(bucket, 9)), set_faults(bucket, invented=["step_0000000012"])),
            "the copy of step 12",
        ),
        "a size that is no number": (of_manifest(set_entry(size="1")), "has no size and SHA-256 for"),
        "a negative size": (of_manifest(set_entry(size=-1)), "has no size and SHA-256 for"),
        "a size beyond all disks": (of_manifest(set_entry(size=10**18)), "bytes, expected 1000000000000000000"),
        "no hash": (of_manifest(set_entry(sha256=None)), "has no size and SHA-256 for"),
        **{f"the name {name[:20]!r}": (of_manifest(rename_a_file(name)), "is not the name of another file") for name in HOSTILE_NAMES},
    }


def tree(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def start(directory: Path, url: str, log: Path, **settings: Any) -> int | str | None:
    """What choose_checkpoint says on this rank: the step, or its error."""
    logging.basicConfig(filename=log, level=logging.INFO, format="%(levelname)s %(message)s", force=True)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        return choose_checkpoint(directory, CheckpointConfig(upload=url, **settings), directory.parent / "events.jsonl")
    except (CheckpointError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def test_a_bad_copy_is_said_and_the_next_older_one_taken(tmp_path):
    """Whatever is wrong with it; and nothing of it is left here or written anywhere else."""
    spoilt = {}
    for number, (name, (act, words)) in enumerate(damages().items()):
        place = tmp_path / str(number)
        url = make_storage(place / "bucket", (6, 9))
        act(place / "bucket")
        spoilt[name] = place, url, words

    def main(rank: int, _size: int) -> list[Any]:
        return [start(place / "run/checkpoints", url, place / f"log-{rank}") for place, url, _ in spoilt.values()]

    before = {name: tree(place) for name, (place, _, _) in spoilt.items()}
    assert run_distributed(main, 2) == [[6] * len(spoilt)] * 2
    for name, (place, url, words) in spoilt.items():
        log = (place / "log-0").read_text()
        warned = [line for line in log.splitlines() if line.startswith("WARNING") and f"in {url} is not used: " in line]
        assert any(words in line for line in warned), f"{name}: {log}"
        assert "Traceback" not in log
        assert "WARNING" not in (place / "log-1").read_text()
        step = "run/checkpoints/step_0000000006"
        expected = ["run", "run/checkpoints", step, *(f"{step}/{file}" for file in (*FILES, "manifest.json"))]
        assert sorted({*tree(place)} - {*before[name]}) == sorted([*expected, "log-0", "log-1"]), name
    assert not Path("/tmp/outside").exists()


def test_faults_that_pass_are_waited_out_and_others_end_the_start(tmp_path):
    bucket = tmp_path / "bucket"
    url = make_storage(bucket)
    good: list[dict[str, Any]] = [
        *({"failing": {kind: 1.0}, "error": "ClientError", "num_failures": 4} for kind in ("list", "info", "get")),
        {"failing": {"get": 0.3}, "seed": 3, "error": "ClientConnectionError"},
        # The listing lacks the newest, and the marker has it.
        {"omitted": ["step_0000000009"]},
    ]
    errors = ("HttpError", "ClientError denied", "OSError")
    bad: list[dict[str, Any]] = [{"failing": {"get": 1.0}, "error": error, "only": "*shards"} for error in errors]

    def main(rank: int, _size: int) -> list[Any]:
        answers = []
        for number, faults in enumerate(good + bad):
            if rank == 0:
                set_faults(bucket, **faults)
            answers.append(start(tmp_path / f"{number}" / "checkpoints", url, tmp_path / f"log-{rank}"))
        return answers

    said = run_distributed(main, 2)
    assert said[0] == said[1]
    assert said[0][: len(good)] == [9] * len(good)
    for number in range(len(good), len(good + bad)):
        assert said[0][number].startswith(f"StorageError: {url}: could not fetch ")
        assert tree(tmp_path / f"{number}/checkpoints") == [], "not an older copy: the newest may be good"


def test_a_copy_that_the_disk_has_no_room_for_is_refused(tmp_path, monkeypatch):
    url = make_storage(tmp_path / "bucket")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(recovery.shutil, "disk_usage", lambda path: usage._replace(free=10))

    def main(rank: int, _size: int) -> Any:
        return start(tmp_path / "run", url, tmp_path / f"log-{rank}")

    said = run_distributed(main, 2)
    assert said[0] == said[1]
    assert said[0].startswith(f"OSError: the copy of step 9 in {url} does not fit into {tmp_path}/run: it has 0.0 MiB")
    assert tree(tmp_path / "run") == []


def event(name: str, step: int = 0) -> str:
    return json.dumps({"step": step, "event": name, "time": 0.0}) + "\n"


SAVED = event("start") + event("checkpoint", 3) + event("checkpoint", 6)
WAS_SENT = f"its {MARKER} says that the checkpoint of step 9 was uploaded"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"newest": 9}', None),
        ('{"newest": null}', None),
        ('{"newest": 9999999999}', None),
        ('{"newest": 10000000000}', "does not have a step"),
        ('{"newest": -1}', "does not have a step"),
        ('{"newest": true}', "does not have a step"),
        ('{"newest": 9.0}', "does not have a step"),
        ("{}", "cannot be read: it has no newest step"),
        ("9", "cannot be read: it has no JSON object"),
        ("[" * 100_000, "cannot be read: it is nested"),
        ('{"newest": ' + "9" * 5000 + "}", "cannot be read: it has an integer of 5000 digits"),
    ],
)
def test_a_marker_of_a_stranger_is_checked(tmp_path, content, problem):
    (tmp_path / MARKER).write_text(content)
    contents = RemoteCheckpoints(f"file://{tmp_path}").contents()
    if problem is None:
        assert contents.marker == Marker(json.loads(content)["newest"])
    else:
        assert contents.marker is None
        assert contents.marker_problem is not None
        assert contents.marker_problem.startswith(f"{MARKER} {problem}")


@pytest.mark.parametrize(
    ("events", "steps", "act", "answer", "words"),
    [
        # Nothing tells of an earlier start.
        (None, (), None, None, "this is the first start that uploads checkpoints to it, or the URL is wrong"),
        (event("start"), (), None, None, "this is the first start"),
        # Killed before the first save; and begun again on purpose, by a version that let one.
        (event("start") * 3, (), lambda bucket, remote: remote.mark(), None, "the run ended before its first upload ended"),
        (SAVED + event("start"), (), None, None, "this is the first start"),
        # The first upload did not end.
        (None, (9,), lambda bucket, remote: unfinish(bucket, remote, Marker()), None, "the run ended before its first upload ended"),
        (None, (9,), lambda bucket, remote: unfinish(bucket, remote, None), "it shows directories of step 9", None),
        # This run has been there before.
        (SAVED, (), None, "this run has saved checkpoints, the last at step 6", None),
        (SAVED, (), lambda bucket, remote: remote.mark(), "this run has saved checkpoints, the last at step 6", None),
        (None, STEPS, lambda bucket, remote: empty(bucket), WAS_SENT, None),
        (None, STEPS, lambda bucket, remote: set_faults(bucket, gone=["step_*"]), WAS_SENT, None),
        (None, (9,), lambda bucket, remote: manifest_of(bucket, 9).write_text("[]"), WAS_SENT, None),
        (
            None,
            (9,),
            lambda bucket, remote: (manifest_of(bucket, 9).write_text("[]"), forget(bucket)),
            "it shows directories of step 9",
            None,
        ),
        (None, (), lambda bucket, remote: (bucket / MARKER).write_text("[]"), f"{MARKER} cannot be read", None),
        (None, (), lambda bucket, remote: (bucket / MARKER).write_text('{"newest": "9"}'), f"{MARKER} does not have a step", None),
        # The marker is no reason to refuse what is good.
        (None, (9,), lambda bucket, remote: (bucket / MARKER).write_text("["), 9, None),
        (SAVED, (9,), lambda bucket, remote: forget(bucket), 9, None),
    ],
)
def test_a_run_that_has_been_there_before_never_begins_again_in_silence(tmp_path, events, steps, act, answer, words):
    bucket, run = tmp_path / "bucket", tmp_path / "run"
    url = make_storage(bucket, steps)
    if act is not None:
        act(bucket, RemoteCheckpoints(url))
    run.mkdir()
    if events is not None:
        (run / "events.jsonl").write_text(events)

    def main(rank: int, _size: int) -> Any:
        return start(run / "checkpoints", url, tmp_path / f"log-{rank}")

    said = run_distributed(main, 1)[0]
    if isinstance(answer, str):
        assert said.startswith("CheckpointError: ")
        assert answer in said
        assert "To begin again at step 0, " in said
        assert complete_steps(run / "checkpoints") == []
    else:
        assert said == answer
    if words is not None:
        assert words in (tmp_path / "log-0").read_text()


def unfinish(bucket: Path, remote: RemoteCheckpoints, marker: Marker | None) -> None:
    manifest_of(bucket, 9).unlink()
    forget(bucket)
    if marker is not None:
        remote.mark()


def empty(bucket: Path) -> None:
    for path in bucket.glob("step_*"):
        shutil.rmtree(path)


def forget(bucket: Path) -> None:
    (bucket / MARKER).unlink()


def test_a_local_run_that_has_saved_never_begins_again_in_silence(tmp_path):
    (tmp_path / "events.jsonl").write_text(SAVED)

    def main(_rank: int, _size: int) -> None:
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        choose_checkpoint(tmp_path / "checkpoints", CheckpointConfig(), tmp_path / "events.jsonl")

    with pytest.raises(CheckpointError, match=r"has no checkpoint, but .*events.jsonl says .* the last at step 6.*To begin again"):
        run_distributed(main, 2)


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
)


@hypothesis.given(JSON)
@hypothesis.settings(max_examples=examples(50))
def test_any_json_is_a_manifest_or_is_refused(value):
    for content in (value, {"files": value}, {"step": 1, "samples": 1, "seconds": 1, "dataset": None, "files": value}):
        names: list[str] = []
        with contextlib.suppress(ValueError):
            names = [*check_manifest(json.dumps(content).encode())["files"]]
        assert not any("/" in name or name in ("", ".", "..") for name in names)


@hypothesis.given(st.binary(max_size=50))
def test_any_bytes_are_refused(content):
    with pytest.raises(ValueError, match=r"manifest.json (cannot be read|lacks)"):
        check_manifest(content)


# What is left there


def test_unfinished_and_old_copies_go_and_undone_ones_stay(tmp_path):
    bucket = tmp_path / "bucket"
    remote = RemoteCheckpoints(make_storage(bucket, (1, 2, 3, 4, 5, 6)))
    manifest_of(bucket, 4).unlink()
    remote.undo_after(5)
    assert json.loads((bucket / MARKER).read_text()) == {"newest": 5}
    manifest_of(bucket, 3).write_text("{")  # counts as one without a score
    remote.remove_old(CheckpointConfig(keep=1, keep_best=1), 0)
    assert sorted(path.name for path in bucket.glob("step_*")) == [f"step_{step:010d}" for step in (5, 6)]
    assert (bucket / "step_0000000006/undone-manifest.json").exists()
    assert remote.steps() == [5]


def test_an_unreachable_storage_does_not_make_a_copy_unfinished(tmp_path):
    """fsspec says of what it cannot reach that it does not exist."""
    bucket = tmp_path / "bucket"
    remote = RemoteCheckpoints(make_storage(bucket))
    set_faults(bucket, failing={"info": 1.0}, only="*manifest.json")
    with pytest.raises(OSError, match="Input/output error"):
        remote.remove_old(CheckpointConfig(keep=3), 0)
    set_faults(bucket)
    assert remote.steps() == [*STEPS]


@pytest.mark.parametrize("error", ["OSError", "ClientError"])
def test_an_undoing_whose_answer_is_lost_is_done(tmp_path, error, monkeypatch):
    bucket = tmp_path / "bucket"
    remote = RemoteCheckpoints(make_storage(bucket))
    files = remote._storage._opened[0]
    move, answers = files.mv, []

    def lose_the_answer(*args):
        move(*args)
        if not answers:
            answers.append(1)
            raise OSError("the connection was lost")

    monkeypatch.setattr(files, "mv", lose_the_answer)
    remote.undo_after(6)
    assert remote.steps() == [3, 6]
    assert counts(bucket)["put failed"] == 0


# On the way there


def send_all(uploader: Uploader, directory: Path, steps: Sequence[int], **settings: Any) -> None:
    """Send checkpoints one after another, each when the one before has ended."""
    for step in steps:
        uploader.upload(make_checkpoint(directory, step), CheckpointConfig(**settings), 0)
        wait_for(uploader)


def wait_for(uploader: Uploader) -> None:
    deadline = time.monotonic() + 20.0
    while uploader.is_busy:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_newest_is_sent_again_when_that_has_failed(tmp_path, caplog):
    bucket = tmp_path / "bucket"
    uploader = Uploader(create(bucket))
    set_faults(bucket, failing={"put": 1.0}, only="step_0000000006/*")
    send_all(uploader, tmp_path / "run", (3, 6), keep=2)
    assert RemoteCheckpoints(f"faulty://{bucket}").steps() == [3]
    assert caplog.text.count("could not be uploaded to") == 1
    set_faults(bucket)
    assert uploader.try_again()
    wait_for(uploader)
    assert complete_steps(bucket) == [3, 6]
    assert not uploader.try_again()
    # A newer one that succeeds makes up for one that failed, whose remains go.
    set_faults(bucket, failing={"put": 1.0}, only="step_0000000009/rank_00001*")
    send_all(uploader, tmp_path / "run", (9, 12), keep=2)
    assert not uploader.try_again()
    assert sorted(path.name for path in bucket.iterdir()) == [MARKER, "step_0000000006", "step_0000000012"]
    assert json.loads((bucket / MARKER).read_text()) == {"newest": 12}


def test_old_copies_that_could_not_be_removed_are_removed_at_the_end(tmp_path, caplog):
    bucket = tmp_path / "bucket"
    uploader = Uploader(create(bucket))
    send_all(uploader, tmp_path / "run", (3,), keep=1)
    set_faults(bucket, failing={"remove": 1.0}, only="step_0000000003*", error="ClientError denied")
    send_all(uploader, tmp_path / "run", (6,), keep=1)
    assert complete_steps(bucket) == [3, 6]
    assert "old checkpoints could not be removed from faulty://" in caplog.text
    set_faults(bucket)
    assert uploader.try_again()
    wait_for(uploader)
    assert complete_steps(bucket) == [6]
    assert "put" not in counts(bucket), "what was sent is not sent again"


def test_a_marker_is_left_before_anything_is_sent_and_never_forgets(tmp_path, caplog):
    bucket = tmp_path / "bucket"
    uploader = Uploader(create(bucket))
    uploader.begin()
    wait_for(uploader)
    assert json.loads((bucket / MARKER).read_text()) == {"newest": None}
    forget(bucket)
    make_checkpoint(bucket, 6)  # sent by a version without markers
    for _ in range(2):
        Uploader(f"faulty://{bucket}/").begin()
        deadline = time.monotonic() + 20.0
        while not (bucket / MARKER).exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert json.loads((bucket / MARKER).read_text()) == {"newest": 6}
    set_faults(bucket, failing={"info": 1.0}, error="PermissionError")
    uploader = Uploader(f"faulty://{bucket}")
    uploader.begin()
    wait_for(uploader)
    assert "uploads will probably fail" in caplog.text
