"""Records on their way to the sinks: who gets what, in which order, and what a new sink takes."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.records.recorded_run import recorded_run, started
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.checkpoints.manifest import Progress  # noqa: E402
from w1train.config.schema import LoggingConfig  # noqa: E402
from w1train.records import watch as watch_module  # noqa: E402
from w1train.records.json_lines import JsonLinesSink  # noqa: E402
from w1train.records.sink import Record, Sink  # noqa: E402
from w1train.records.watch import SINKS, Watch  # noqa: E402
from w1train.runtime.distributed import Ranks  # noqa: E402
from w1train.runtime.masking import remember_passwords  # noqa: E402
from w1train.runtime.record_files import MetricsLog, read_metrics  # noqa: E402

CALLS: list[tuple[str, str, Any]] = []


class Spy(Sink):
    """A sink that notes the calls of its methods."""

    def start(self) -> None:
        CALLS.append((type(self).__name__, "start", None))

    def record(self, record: Record) -> None:
        CALLS.append((type(self).__name__, "record", record))

    def record_samples(self, samples: Any) -> None:
        CALLS.append((type(self).__name__, "samples", samples))

    def record_event(self, event: Record) -> None:
        CALLS.append((type(self).__name__, "event", event["event"]))

    def go_back(self, step: int) -> None:
        CALLS.append((type(self).__name__, "go_back", step))

    def sync(self) -> None:
        CALLS.append((type(self).__name__, "sync", None))

    def close(self, *, failed: bool) -> None:
        CALLS.append((type(self).__name__, "close", failed))


class First(Spy):
    """The first of two sinks."""


class Second(Spy):
    """The second of two sinks; it may fail."""

    error: ClassVar[Exception | None] = None

    def start(self) -> None:
        super().start()
        if self.error is not None:
            raise self.error


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    """Return the calls of two spies, which take the place of the real sinks."""
    monkeypatch.setattr(watch_module, "SINKS", (First, Second))
    CALLS.clear()
    return CALLS


def watching(directory: Path, progress: Progress, rank: int = 0, **logging_fields: Any) -> Watch:
    ranks = Ranks(rank, 2, rank, 2, torch.device("cpu"))
    return Watch(recorded_run(directory, step=progress.step, **{"wandb": "disabled", **logging_fields}), ranks, progress)


def test_each_sink_gets_everything_in_order(tmp_path, calls):
    progress = Progress(step=3, samples=24)
    with watching(tmp_path, progress) as watch:
        progress.step, progress.samples = 4, 32
        watch.record("train", {"loss": 1.0})
        watch.record("validation", {"elbo": 2.0})
        watch.record_samples([("a", "ab"), ("b", "bc")])
        watch.sync()
        progress.step = 2
        watch.go_back()
    train = {"kind": "train", "step": 4, "samples": 32, "tokens": 1024, "loss": 1.0}
    validation = {"kind": "validation", "step": 4, "tokens": 1024, "elbo": 2.0}
    samples = [{"step": 4, "tokens": 1024, "prompt": prompt, "text": text} for prompt, text in (("a", "ab"), ("b", "bc"))]
    told = [("record", train), ("record", validation), ("samples", samples), ("sync", None), ("go_back", 2), ("event", "rewind")]
    assert calls == [
        *(("First", "start", None), ("First", "event", "resume"), ("Second", "start", None), ("Second", "event", "resume")),
        *((sink, method, value) for method, value in told for sink in ("First", "Second")),
        *(("Second", "close", False), ("First", "close", False)),
    ]
    assert list(calls[4][2]) == list(train), "the order of a line's keys"


def test_other_ranks_touch_nothing(tmp_path, calls):
    with watching(tmp_path, Progress(), rank=1) as watch:
        watch.record("train", {})
        watch.record_samples([("", "")])
        watch.event("checkpoint", step=1)
        watch.go_back()
        watch.sync()
    assert calls == []


def test_an_error_is_told_to_all_sinks(tmp_path, calls):
    def train() -> None:
        with watching(tmp_path, Progress()):
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        train()
    assert calls[-2:] == [("Second", "close", True), ("First", "close", True)]


def test_a_sink_that_does_not_start_leaves_none_started(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(Second, "error", OSError("no space"))
    with pytest.raises(OSError, match="no space"):
        watching(tmp_path, Progress()).__enter__()
    assert calls[-2:] == [("Second", "close", True), ("First", "close", True)]


def test_only_what_is_wanted_is_made():
    def names(**fields: Any) -> list[str]:
        return [sink.__name__ for sink in SINKS if sink.is_wanted(LoggingConfig(**fields))]

    optional = ["WandbSink", "TensorBoardSink"]
    every = [sink.__name__ for sink in SINKS]
    assert names(wandb="disabled") == [name for name in every if name not in optional]
    assert names(wandb="offline", tensorboard=True) == every
    assert {"JsonLinesSink", "ConsoleSink", *optional} <= {*every}


def test_events_have_no_passwords(tmp_path):
    remember_passwords(["s3://amelie:correct-horse@host"])
    with watching(tmp_path, Progress()) as watch:
        watch.event("note", step=7, where="s3://amelie:correct-horse@host", alone="correct-horse")
    start, note = read_metrics(tmp_path / "events.jsonl")
    assert (start["event"], start["step"], start["world_size"]) == ("start", 0, 2)
    assert {key: note[key] for key in note.keys() - {"time"}} == {
        "step": 7,
        "event": "note",
        "where": "s3://amelie:***@host",
        "alone": "***",
    }


def test_files_are_cut_back_to_the_checkpoint(tmp_path, caplog):
    for name in ("metrics", "samples", "events"):
        with MetricsLog(tmp_path / f"{name}.jsonl") as log:
            for step in (1, 2, 4, 5, 6):
                log.append({"kind": "train", "step": step, "time": 1e12})
    before = (tmp_path / "events.jsonl").read_bytes()
    with started(JsonLinesSink(recorded_run(tmp_path, step=5))) as sink:
        sink.sync()
        assert (tmp_path / "events.jsonl").read_bytes() == before
        sink.go_back(4)
    assert [[record["step"] for record in read_metrics(tmp_path / f"{name}.jsonl")] for name in ("metrics", "samples")] == [[1, 2, 4]] * 2
    assert "has no records of 1 of the 5 steps before this start (step 3 to 3)" in caplog.text
    assert "s behind the newest event of" in caplog.text


def test_a_run_that_begins_keeps_nothing(tmp_path, caplog):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append({"kind": "validation", "step": 0})
    with started(JsonLinesSink(recorded_run(tmp_path))):
        pass
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_nothing_but_the_registration_names_a_sink():
    code = inspect.getsource(watch_module).partition('"""All sinks')[2]
    assert code
    assert [sink.__name__ for sink in SINKS if sink.__name__ in code] == []
