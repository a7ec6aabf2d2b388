"""The events of a report (restarts, checkpoints, skipped steps), its waiting times, and metrics that it has no chart for."""

from __future__ import annotations

from pathlib import Path

from tests.reports.fake_run import train_record
from tests.reports.test_report import Page, report, write_log
from w1train.runtime.record_files import MetricsLog


def happened(run_dir: Path, *events: tuple[int, str]) -> Path:
    with MetricsLog(run_dir / "events.jsonl") as log:
        for step, event in events:
            log.append({"step": step, "event": event, "time": 0.0})
    return run_dir


def drawn(page: Page, kind: str) -> int:
    """Return the number of marks of a kind."""
    return [found for _, found in page.charts()["ELBO, bits per byte"]["marks"]].count(kind)


def test_events_are_marked(tmp_path):
    records = [train_record(step) | {"health/skipped_steps": (step >= 12) + (step >= 30)} for step in range(1, 41)]
    run = happened(write_log(tmp_path, *records), (0, "start"), (10, "checkpoint"), (10, "resume"), (10, "resume"), (20, "checkpoint"))
    page = report(run)
    assert (drawn(page, "restart"), drawn(page, "checkpoint"), drawn(page, "skipped")) == (1, 2, 2)
    assert "2 restarts" in page.words
    assert "2 checkpoints" in page.words
    assert "2 steps skipped" in page.words


def test_a_first_start_is_no_restart_and_a_second_one_is(tmp_path):
    assert "restart" not in report(happened(write_log(tmp_path / "a", train_record(1)), (0, "start"))).words
    assert "1 restart" in report(happened(write_log(tmp_path / "b", train_record(1)), (0, "start"), (0, "start"))).words


def test_thousands_of_checkpoints_are_thinned(tmp_path):
    run = happened(write_log(tmp_path, train_record(1), train_record(5000)), *((step, "checkpoint") for step in range(1, 5001)))
    page = report(run)
    assert drawn(page, "checkpoint") <= 151
    assert "5,000 checkpoints" in page.words


def test_waiting_is_shown_where_it_is_measured(tmp_path):
    records = [train_record(step) for step in range(1, 30)]
    assert "Waiting, share of the step" not in report(write_log(tmp_path / "without", *records)).charts()
    measured = [
        record | {"time/step_seconds": 2.0, "time/communication_seconds": 0.5, "time/data_wait_seconds": 0.02} for record in records
    ]
    page = report(write_log(tmp_path / "with", *measured))
    assert "Waiting, share of the step" in page.charts()
    assert "data 1.0% communication 25.0%" in page.words


def test_numbers_that_the_page_does_not_know_have_charts(tmp_path):
    more = {"checkpoint/stall_seconds": 0.25, "skipped": "nan", "flag": True}
    records = [train_record(step) | (more if step % 10 == 0 else {}) | {"health/rank_spread": 1.0 + step} for step in range(1, 31)]
    page = report(write_log(tmp_path, *records))
    assert {"checkpoint/stall_seconds", "health/rank_spread"} <= set(page.charts())
    assert {"skipped", "flag"}.isdisjoint(page.charts())
    assert "More measurements checkpoint/stall_seconds 0.25" in page.words
