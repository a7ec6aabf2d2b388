"""Made-up results side by side."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks import compare
from benchmarks.common.records import Record


def record(date, results, device="NVIDIA H100 80GB HBM3", torch="2.11.0", benchmark="step"):
    return Record(
        benchmark=benchmark,
        command="python -m x",
        machine={"device": device, "driver": "580"},
        versions={"torch": torch},
        results=results,
        date=f"{date}T10:00:00+00:00",
        commit="abc",
    )


@pytest.fixture
def results(tmp_path):
    """A repository with a folder of results, and how to commit what is in it."""

    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "--quiet")
    (tmp_path / "results").mkdir()

    def write(each, commit=False):
        path = tmp_path / "results" / f"{each.date[:10]}-{each.benchmark}.json"
        path.write_text(each.to_json())
        if commit:
            git("add", ".")
            git("commit", "--quiet", "--message", "results")
        return path

    write.directory = tmp_path / "results"
    return write


OLD = {"a": {"step_ms": 100.0, "mfu": 0.5, "memory_gib": None}, "only old": {"step_ms": 1.0}}
NEW = {"a": {"step_ms": 90.0, "mfu": 0.55, "memory_gib": 3.0}, "only new": {"step_ms": 1.0}}


def test_newest_beside_the_last_committed(results, capsys):
    results(record("2026-01-01", {"a": {"step_ms": 1.0}}), commit=True)
    results(record("2026-02-01", OLD), commit=True)
    results(record("2026-03-01", NEW))
    assert compare.main([f"--results={results.directory}"]) == 0
    shown = capsys.readouterr().out
    assert "2026-03-01 beside 2026-02-01 (abc)" in shown
    table = compare.comparison(record("2026-03-01", NEW), record("2026-02-01", OLD))
    assert table.rows == [
        ("a", "step_ms", "100", "90", "0.900", "better"),
        ("a", "mfu", "0.5", "0.55", "1.100", "better"),
        ("only old", "gone", "", "", "", ""),
        ("only new", "new", "", "", "", ""),
    ]


def test_a_second_result_of_the_day_is_compared_with_the_committed_first(results):
    first = record("2026-02-01", OLD)
    path = results(first, commit=True)
    second = record("2026-02-01", NEW)
    second.date = "2026-02-01T18:00:00+00:00"
    path.write_text(second.to_json())
    newest = compare.read_newest("step", results.directory)
    assert newest.date == second.date
    assert compare.read_committed("step", results.directory, newest).date == first.date


def test_worse_is_an_error_status_on_the_same_machine_alone(results, capsys):
    results(record("2026-02-01", OLD), commit=True)
    slower = {"a": {"step_ms": 120.0}}
    path = results(record("2026-03-01", slower))
    assert compare.main(["step", f"--results={results.directory}"]) == 1
    path.write_text(record("2026-03-01", slower, device="NVIDIA H200", torch="2.12.0").to_json())
    assert compare.main(["step", f"--results={results.directory}"]) == 0
    shown = capsys.readouterr().out
    assert "warning: other device: NVIDIA H100 80GB HBM3 -> NVIDIA H200" in shown
    assert "warning: other version of torch: 2.11.0 -> 2.12.0" in shown


def test_nothing_to_compare(results, tmp_path, capsys):
    results(record("2026-02-01", OLD, benchmark="other"), commit=True)
    assert compare.main([f"--results={results.directory}"]) == 0
    assert "no earlier result" in capsys.readouterr().out
    assert compare.main(["step", f"--results={results.directory}"]) == 2
    assert "has no result of step" in capsys.readouterr().err
    elsewhere = tmp_path / "newest.json"
    elsewhere.write_text(record("2026-03-01", NEW, benchmark="other").to_json())
    assert compare.main([f"--newest={elsewhere}", f"--results={results.directory}"]) == 0


@pytest.mark.parametrize(
    ("metric", "ratio", "expected"),
    [
        ("step_ms", 1.2, "worse"),
        ("step_ms", 0.8, "better"),
        ("mfu", 1.2, "better"),
        ("visible_tflops", 0.8, "worse"),
        ("tokens_per_second", 1.2, "better"),
        ("memory_gib", 1.2, "worse"),
        ("mfu", 1.04, ""),
        ("attention share", 2.0, ""),
        ("mfu", float("nan"), ""),
    ],
)
def test_judgement(metric, ratio, expected):
    assert compare.judgement(metric, ratio) == expected
