"""The page that compares runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reports.fake_run import TOKENS_PER_STEP, train_record, validation_record, write_fake_run
from tests.reports.test_report import Page, write_log
from w1train import report
from w1train.config.errors import UserError
from w1train.reports.report_compare import MAX_RUNS, write_comparison
from w1train.runtime.exit_status import ExitStatus
from w1train.runtime.quantities import quantity
from w1train.runtime.record_files import MetricsLog


def compare(tmp_path: Path, *run_dirs: Path) -> Page:
    page = Page(write_comparison(run_dirs, tmp_path / "comparison.html").read_text())
    assert all(chart["x"] for chart in page.charts().values())
    return page


def write_config(run_dir: Path, config: dict) -> None:
    (run_dir / "config.yaml").write_text(json.dumps(config))


def test_two_runs(tmp_path):
    first, second = write_fake_run(tmp_path / "first", 120), write_fake_run(tmp_path / "second", 80)
    write_config(first, {"name": "first", "model": {"num_layers": 6}, "optimizer": {"beta1": 0.9, "clip_grad": 1.0}})
    write_config(second, {"name": "second", "model": {"num_layers": 6}, "optimizer": {"beta1": 0.8}, "flag": True})
    page = compare(tmp_path, first, second)
    assert {"Validation ELBO, bits per byte", "Training ELBO, bits per byte", "Gradient norm", "Tokens per second"} <= set(page.charts())
    # Both runs were validated after 60 steps, and only one of them after 80.
    measured = f"{validation_record(60)['elbo']:.4f}"
    assert f"validation ELBO at {quantity(60 * TOKENS_PER_STEP)} tokens {measured} {measured}" in page.words
    assert "interpolated" not in page.words
    assert f"validation, bits per byte {validation_record(120)['elbo_bits_per_byte']:.4f}" in page.words
    assert "3 keys differ. first second optimizer.beta1 0.9 0.8 optimizer.clip_grad 1.0 \u2013 flag \u2013 true" in page.words
    assert "num_layers" not in page.words


def test_a_mixture_of_experts_beside_a_dense_model(tmp_path):
    dense, mixture = write_fake_run(tmp_path / "dense", 80), write_fake_run(tmp_path / "mixture", 80)
    for run, active in ((dense, 12_583_424), (mixture, 4_000_000)):
        path = run / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_active_parameters": active}))
    records = [json.loads(line) for line in (mixture / "metrics.jsonl").read_text().splitlines()]
    loads = [record | {"experts/load": 1.5, "experts/unused": 0.25} if record["kind"] == "train" else record for record in records]
    (mixture / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in loads))
    page = compare(tmp_path, dense, mixture)
    assert "parameters 12,583,424 12,583,424 parameters that compute a token 12,583,424 4,000,000" in page.words
    assert "largest load of an expert at the end, times the mean \u2013 1.50" in page.words
    assert "experts without a token at the end \u2013 25.0%" in page.words
    assert "Largest load of an expert, times the mean" in page.charts()


def test_the_better_one_is_marked(tmp_path):
    worse = [validation_record(0), train_record(1), validation_record(1)]
    better = [validation_record(0), train_record(1), validation_record(1) | {"elbo": 1.0, "elbo_bits_per_byte": 0.4}]
    page = compare(tmp_path, write_log(tmp_path / "worse", *worse), write_log(tmp_path / "better", *better))
    assert re.search(r'<td>\d\.\d{4}</td><td class="best">0\.4000</td>', page.text)
    assert "0.4000" in page.words


def validated(run_dir: Path, values: dict[int, float]) -> Path:
    """Write a run with these validation ELBOs by step."""
    records = [validation_record(step) | {"elbo": value} for step, value in values.items()]
    return write_log(run_dir, *sorted([train_record(1), *records], key=lambda record: record["step"]))


def row_of(page: Page, title: str) -> list[tuple[str, str]]:
    """Return (class, text) of the cells of a row of the results."""
    (row,) = re.findall(rf"<tr><td>{title}[^<]*</td>(.*?)</tr>", page.text)
    return re.findall(r'<td(?: class="(\w+)")?>([^<]*)</td>', row)


def test_measured_values_are_compared_at_the_last_common_validation(tmp_path):
    first = validated(tmp_path / "first", {0: 8.0, 10: 5.0, 20: 4.0, 40: 3.0})
    second = validated(tmp_path / "second", {0: 8.0, 5: 6.0, 20: 3.5, 30: 3.2})
    assert row_of(compare(tmp_path, first, second), "validation ELBO at") == [("", "4.0000"), ("best", "3.5000")]


def test_an_interpolated_value_is_marked_and_its_row_has_no_best(tmp_path):
    first = validated(tmp_path / "first", {0: 8.0, 10: 5.0, 30: 3.0})
    second = validated(tmp_path / "second", {0: 8.0, 15: 4.8, 20: 4.6})
    third = validated(tmp_path / "third", {0: 8.0, 20: 4.7, 50: 2.0})
    page = compare(tmp_path, first, second, third)
    assert row_of(page, "validation ELBO at") == [("muted", "\u2248 4.0000 (interpolated)"), ("", "4.6000"), ("", "4.7000")]
    assert "no validation after the same number of tokens" in page.words
    assert row_of(page, "best validation ELBO") == [("", "3.0000"), ("", "4.6000"), ("best", "2.0000")]


def test_runs_that_were_validated_at_the_start_only_have_no_common_row(tmp_path):
    runs = [validated(tmp_path / name, {0: 8.0}) for name in "ab"]
    assert "validation ELBO at" not in compare(tmp_path, *runs).words


def test_values_that_read_alike_are_equally_good(tmp_path):
    page = compare(tmp_path, validated(tmp_path / "a", {0: 3.00001}), validated(tmp_path / "b", {0: 3.00002}))
    assert row_of(page, "best validation ELBO") == [("best", "3.0000")] * 2


def test_a_curve_is_where_its_tokens_are(tmp_path):
    """The second run takes half as many tokens a step: its curve ends in the middle."""
    first = write_log(tmp_path / "first", *(train_record(step) for step in range(1, 41)))
    second = write_log(tmp_path / "second", *(train_record(step) | {"tokens": TOKENS_PER_STEP * step // 2} for step in range(1, 41)))
    page = compare(tmp_path, first, second)
    ends = [page.curve("Gradient norm", index)[0][-1] for index in (0, 1)]
    assert ends == [40 * TOKENS_PER_STEP, 20 * TOKENS_PER_STEP]
    assert page.charts()["Gradient norm"]["x"] == {"label": "tokens", "range": [0.0, 40 * TOKENS_PER_STEP]}
    assert [line["name"] for line in page.charts()["Gradient norm"]["lines"]] == ["first", "second"]


def test_events_are_counted(tmp_path):
    runs = []
    for name, starts in (("calm", 1), ("troubled", 3)):
        runs.append(write_log(tmp_path / name, train_record(1), train_record(2) | {"health/skipped_steps": starts - 1}))
        with MetricsLog(runs[-1] / "events.jsonl") as log:
            for number in range(starts):
                log.append({"step": 0, "event": "start" if number == 0 else "resume", "time": 0.0})
    words = compare(tmp_path, *runs).words
    assert "restarts 0 2" in words
    assert "steps skipped 0 2" in words


def test_runs_of_one_name_are_told_apart_and_escaped(tmp_path):
    page = compare(tmp_path, *(write_log(tmp_path / place / "<b>run", train_record(1)) for place in ("a", "b")))
    assert f"{tmp_path}/a/<b>run" in page.words
    assert f"{tmp_path}/b/<b>run" in page.words


def test_too_many_runs(tmp_path):
    run = write_log(tmp_path / "run", train_record(1))
    compare(tmp_path, *[run] * MAX_RUNS)
    with pytest.raises(UserError, match=f"{MAX_RUNS + 1} runs to compare; {MAX_RUNS} at most"):
        compare(tmp_path, *[run] * (MAX_RUNS + 1))


def test_empty_runs(tmp_path):
    assert compare(tmp_path, write_log(tmp_path / "a"), write_log(tmp_path / "b")).words


def test_steps_that_took_no_time(tmp_path):
    """A run whose clock stood still has a page too."""
    still = {"time/step_seconds": 0.0, "time/data_wait_seconds": 0.0}
    runs = [write_log(tmp_path / name, train_record(1) | still) for name in "ab"]
    assert "waiting for data" not in compare(tmp_path, *runs).words


def test_the_command(tmp_path):
    runs = [str(write_log(tmp_path / name, train_record(1))) for name in ("a", "b")]

    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "w1train.report", *arguments], capture_output=True, text=True, timeout=60)

    assert command(*runs).stdout.strip() == f"{runs[0]}/comparison.html"
    assert command(*runs, "--output", str(tmp_path / "c.html")).stdout.strip() == str(tmp_path / "c.html")
    assert "--compare needs a single RUN" in command(*runs, "--compare", runs[0]).stderr


def _fault(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a mistake, or nothing."""
    status = report.main(arguments)
    message = capsys.readouterr().err
    assert status == (ExitStatus.MISTAKE if message else ExitStatus.FINISHED)
    return message


def test_the_command_replaces_no_file_of_a_run_and_no_other_page(tmp_path, capsys):
    runs = [str(write_log(tmp_path / name, train_record(1))) for name in ("a", "b")]
    page = tmp_path / "page.html"

    def fault(*arguments: str) -> str:
        return _fault(capsys, *runs, "--output", *arguments)

    before = Path(runs[0], "metrics.jsonl").read_bytes()
    (tmp_path / "link").symlink_to(Path(runs[0], "metrics.jsonl"))
    (tmp_path / "scratch/step_1").mkdir(parents=True)
    (tmp_path / "scratch/step_1/manifest.json").write_text("{}")
    (tmp_path / "scratch/run").symlink_to(runs[0])
    Path(runs[0], "checkpoints").symlink_to(tmp_path / "scratch")
    for name in (f"{runs[0]}/metrics.jsonl", f"{tmp_path}/link", f"{tmp_path}/scratch/step_1/manifest.json"):
        assert "is the input" in fault(name, "--overwrite")
    assert Path(runs[0], "metrics.jsonl").read_bytes() == before
    assert fault(str(page)) == ""
    assert "exists already: choose another name, or give --overwrite" in fault(str(page))
    assert fault(str(page), "--overwrite") == ""


def test_a_page_without_output_replaces_only_the_page_of_the_same_runs(tmp_path, capsys, monkeypatch):
    for name in ("a", "b", "c"):
        write_log(tmp_path / "runs" / name, train_record(1))

    def fault(*arguments: str) -> str:
        return _fault(capsys, *arguments)

    monkeypatch.chdir(tmp_path / "runs")
    assert fault("a", "b", "c") == fault("a", "c", "b") == fault("a") == fault("./a") == ""
    (tmp_path / "runs").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert "nowhere is no run directory" in fault("nowhere")
    assert fault("moved/a", "moved/b", "moved/c") == fault("moved/a") == ""
    comparison, page = (Path("moved/a", name).read_bytes() for name in ("comparison.html", "report.html"))
    refusal = "exists already: choose another name, or give --overwrite"
    assert refusal in fault("moved/a", "moved/c")
    assert refusal in fault("moved/a", "--compare", "moved/b")
    assert [Path("moved/a", name).read_bytes() for name in ("comparison.html", "report.html")] == [comparison, page]
    assert fault("moved/a", "--compare", "moved/b", "--overwrite") == ""
    Path("moved/a/report.html").write_text("<p>notes of a person</p>")
    assert refusal in fault("moved/a")
    Path("moved/a/report.html").unlink()
    Path("moved/a/report.html").symlink_to("metrics.jsonl")
    assert "is the input" in fault("moved/a", "--overwrite")
