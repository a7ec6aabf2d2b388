"""Profiles of steps of a real run: what is in the files, and that the run is none the worse for it."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from w1train.config.schema_operation import ProfilingConfig
from w1train.profiling.profiler import Profiler
from w1train.profiling.step_parts import PARTS, Part, PartClock, parts_table
from w1train.runtime.ranges import KernelGroup, step_part


@pytest.fixture(scope="module")
def profiled(tiny_data, tmp_path_factory):
    """(run, output): step 3 ends with a save, step 12 is the last; step 13 and rank 7 are not there."""
    from tests.end_to_end.runs import TinyRun

    run = TinyRun(tiny_data, tmp_path_factory.mktemp("profiled"))
    outcome = run.train("profiling={steps: [3, 12, 13], ranks: [1, 0, 7]}", world_size=2).require(0)
    return run, outcome


def test_the_numbers_are_those_of_the_run_without(profiled, undisturbed):
    run, _ = profiled
    assert run.metrics() == undisturbed(2, "fp32").metrics()
    assert run.samples() == undisturbed(2, "fp32").samples()


def test_traces_hold_the_parts(profiled):
    run, _ = profiled
    names = {f"step_{step}_rank_{rank}.{suffix}" for step in (3, 12) for rank in (0, 1) for suffix in ("json.gz", "txt")}
    assert {path.name for path in (run.path / "profile").iterdir()} == names
    for step, others in ((3, {"save"}), (12, {"save", "validate", "sample"})):
        trace = json.loads(gzip.decompress((run.path / "profile" / f"step_{step}_rank_1.json.gz").read_bytes()))
        found = {event.get("name") for event in trace["traceEvents"]}
        assert {"data", "forward", "backward", "reduce", "optimizer", *others} <= found
        assert {f"w1train: {group}" for group in get_args(KernelGroup)} | {"aten::mm"} <= found
        assert not ({"validate", "sample"} - others) & found


def test_the_table_adds_up(profiled):
    run, outcome = profiled
    table = (run.path / "profile" / "step_3_rank_0.txt").read_text()
    assert table.rstrip("\n") in outcome.output
    rows = {
        name: float(seconds)
        for name, seconds in re.findall(r"^(\w+) +\d* +(\d+\.\d+) +-?[\d.]+%$", table.split("operators")[0], re.MULTILINE)
    }
    assert {"data", "forward", "backward", "reduce", "optimizer", "save", "other", "step"} <= rows.keys()
    parts = [rows[name] for name in (*PARTS, "other") if name in rows]
    assert sum(parts) == pytest.approx(rows["step"], abs=1e-3)
    assert min(parts) > -1e-3
    assert "no memory snapshot" in outcome.output
    assert "there is no rank 7 among 2" in outcome.output
    assert "profiling.steps: this start did not reach 13" in outcome.output


def test_nobody_listens_when_off():
    ranks = SimpleNamespace(rank=0, world_size=1, is_main=True, device=torch.device("cpu"))
    timer = SimpleNamespace(restart=lambda: pytest.fail("no time was spent"))
    with Profiler(ProfilingConfig(), ranks, None) as profiler:
        profiler.step_begins(1, timer)
        with step_part.listening(lambda name: pytest.fail("no range was opened")):
            pass


def test_nsys_needs_a_gpu(caplog):
    ranks = SimpleNamespace(rank=0, world_size=1, is_main=True, device=torch.device("cpu"))
    with Profiler(ProfilingConfig(tool="nsys", steps=[1]), ranks, None) as profiler:
        profiler.step_begins(1, SimpleNamespace())
    assert "NVTX ranges need a GPU" in caplog.text


@pytest.mark.parametrize(("first", "expected"), [(1, [1, 2, "start", 3, 4, 5, "stop", 6, 7]), (4, ["start", 4, 5, "stop", 6, 7])])
def test_nsys_records_from_the_first_to_the_last_step(monkeypatch, first, expected):
    """A resumed run, from where it is."""
    calls: list[object] = []
    cudart = SimpleNamespace(cudaProfilerStart=lambda: calls.append("start"), cudaProfilerStop=lambda: calls.append("stop"))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    ranks = SimpleNamespace(rank=0, world_size=1, is_main=True, device=torch.device("cuda"))
    with Profiler(ProfilingConfig(tool="nsys", steps=[5, 3]), ranks, None) as profiler:
        for step in range(first, 8):
            profiler.step_begins(step, SimpleNamespace())
            calls.append(step)
    assert calls == expected


def test_nsys_marks_every_part(monkeypatch):
    """Parts inside parts, too: a tool with a time line shows both."""
    marks: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: contextlib.nullcontext(marks.append(name)))
    forward = step_part("forward")(lambda: None)
    ranks = SimpleNamespace(rank=0, world_size=1, is_main=True, device=torch.device("cuda"))
    with Profiler(ProfilingConfig(tool="nsys"), ranks, None):
        step_part("validate")(forward)()
    forward()
    assert marks == ["validate", "forward"]


def test_a_part_inside_another_is_counted_as_that():
    marks: list[str] = []
    clock = PartClock(torch.device("cpu"), lambda name: contextlib.nullcontext(marks.append(name)))
    forward = step_part("forward")(lambda: 7)
    validate = step_part("validate")(forward)
    with step_part.listening(clock.part):
        clock.start()
        assert (validate(), forward(), forward()) == (7, 7, 7)
        parts = clock.stop()
    assert marks == ["validate", "forward", "forward"]
    assert {name: part.calls for name, part in parts.items()} == {"step": 1, "validate": 1, "forward": 2}
    assert parts["step"].host_seconds >= parts["validate"].host_seconds + parts["forward"].host_seconds


def test_shares_are_of_the_device_where_there_is_one():
    parts = {"step": Part(1, 1.0, 4.0), "forward": Part(2, 0.1, 1.0)}
    heading, forward, other, step = parts_table(parts, PARTS)
    assert heading.split() == ["part", "calls", "host", "s", "device", "s", "share"]
    assert forward.split() == ["forward", "2", "0.1000", "1.0000", "25.0%"]
    assert other.split() == ["other", "0.9000", "3.0000", "75.0%"]
    assert step.split() == ["step", "1.0000", "4.0000", "100.0%"]
