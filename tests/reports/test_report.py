"""The report must be one safe, self-contained, well-formed file, whatever the run looks like."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.reports.fake_run import UNIGRAM_BITS_PER_BYTE, sample_record, train_record, validation_record, write_fake_run
from w1train.reports.run_report import write_report
from w1train.runtime.record_files import MetricsLog

VOID = {"meta", "br", "path", "circle", "rect"}


class Page(HTMLParser):
    """A parser that checks that tags nest, and collects the parts that tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open, self.tags = text, [], []
        self.pieces: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.pieces.append(data)

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attributes[name] for found, attributes in self.tags if found == tag and name in attributes]

    def charts(self) -> list[str]:
        return self.attributes("svg", "aria-label")

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def report(run_dir: Path) -> Page:
    page = Page(write_report(run_dir).read_text())
    coordinates = " ".join(page.attributes("path", "d") + page.attributes("rect", "x") + page.attributes("circle", "cy"))
    assert not re.search(r"nan|inf|None", coordinates)
    return page


def write_log(run_dir: Path, *records: dict) -> Path:
    with MetricsLog(run_dir / "metrics.jsonl") as log:
        for record in records:
            log.append(record)
    return run_dir


def test_a_finished_run_shows_everything(tmp_path):
    page = report(write_fake_run(tmp_path / "demo", 120))
    assert {
        "ELBO, bits per byte",
        "Training loss",
        "Masked cross-entropy",
        "Training loss by t over steps",
        "Validation loss by t",
        "Gradient norm",
        "Learning rate",
        "Throughput",
        "Mask ratio",
    } == set(page.charts())
    assert all(len(path) > 100 for path in _curves(page))
    assert "finished after 120 steps" in page.words
    assert "12.6M" in page.words
    assert f"unigram {UNIGRAM_BITS_PER_BYTE:.2f}" in page.words
    assert '"hidden_size": 384' in page.words
    assert "megatron-core" in page.words


def _curves(page: Page) -> list[str]:
    """Return the path data of every curve. Only paths inside g.curve are curves: axes and grid lines are paths too."""
    curves = [path for path in page.attributes("path", "d") if path.count("L") > 5]
    assert curves
    return curves


def test_headline_compares_with_the_unigram_model(tmp_path):
    end = validation_record(120)["elbo_bits_per_byte"]
    words = report(write_fake_run(tmp_path / "demo", 120)).words
    assert f"{end:.3f} bits per byte on validation text" in words
    assert f"{1 - end / UNIGRAM_BITS_PER_BYTE:.1%} below" in words


def test_nothing_is_fetched(tmp_path):
    page = report(write_fake_run(tmp_path / "demo", 40))
    assert "://" not in page.text
    assert not re.search(r"@import|url\((?!#clip)", page.text)
    assert [tag for tag, attributes in page.tags if {"src", "href", "srcset"} & attributes.keys()] == []
    assert any("default-src 'none'" in value for value in page.attributes("meta", "content"))


def test_samples_are_text_whatever_they_say(tmp_path):
    write_fake_run(tmp_path / "demo", 8)
    attack = "</pre></main><script src='https://evil'>alert(1)</script><img onerror=x> <|mask|><|mask|> & \ud800"
    with MetricsLog(tmp_path / "demo" / "samples.jsonl") as log:
        log.append({"step": 9, "tokens": 1, "prompt": "<b>prompt</b>", "text": "<b>prompt</b>" + attack})
    (tmp_path / "demo" / "config.yaml").write_text("name: '</pre><script>'")
    page = report(tmp_path / "demo")
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in page.tags]
    assert "alert(1)" in page.words
    assert page.words.count("<b>prompt</b>") == 1
    assert "\u2591\u2591 &" in page.words.replace(" \u2591", "\u2591").replace("> \u2591", ">\u2591")


def test_the_run_name_is_escaped(tmp_path):
    page = report(write_log(tmp_path / "<i>&", train_record(1)))
    assert "<i>&" in page.words


def test_an_unfinished_run(tmp_path):
    page = report(write_fake_run(tmp_path / "demo", 60, finished=False))
    assert "not finished, at step 60" in page.words
    assert "Gradient norm" in page.charts()


def test_a_summary_of_an_earlier_shorter_run_is_not_the_end(tmp_path):
    run_dir = write_log(write_fake_run(tmp_path / "demo", 20), train_record(21))
    assert "not finished, at step 21" in report(run_dir).words


@pytest.mark.parametrize(
    "records",
    [
        [],
        [train_record(1)],
        [validation_record(0)],
        [validation_record(0), train_record(1), validation_record(1)],
        [train_record(step) | {"loss": math.nan, "grad_norm": math.inf} for step in range(1, 30)],
        [train_record(1) | dict.fromkeys(("elbo_bits_per_byte", "loss_by_t", "learning_rate", "grad_norm", "time/mfu"))],
        [train_record(step) | {"loss_by_t": [None] * 10, "learning_rate": 0.0, "grad_norm": 0.0} for step in range(1, 4)],
        [train_record(1, num_t_bins=4), train_record(2, num_t_bins=10)],
        [train_record(step) | {"loss": 2.5} for step in range(1, 200)],
    ],
    ids=["empty", "one step", "start only", "smallest", "not finite", "nulls", "zeros", "other bins", "constant"],
)
def test_odd_runs(tmp_path, records):
    page = report(write_log(tmp_path, *records))
    assert page.words


def test_without_bytes_the_elbo_is_in_nats(tmp_path):
    records = [validation_record(0), *(train_record(step) for step in range(1, 30))]
    page = report(write_log(tmp_path, *(record | {"elbo_bits_per_byte": None} for record in records)))
    assert "ELBO, nats per token" in page.charts()


def test_steps_that_are_not_finite_are_said(tmp_path):
    records = [train_record(step) | ({"loss": math.nan} if step in (7, 9) else {}) for step in range(1, 30)]
    assert "2 NaN or infinite" in report(write_log(tmp_path, *records)).words


def test_mfu_is_shown_where_it_is_known(tmp_path):
    records = [train_record(step) | {"time/mfu": 0.4321} for step in range(1, 30)]
    page = report(write_log(tmp_path, *records))
    assert "Model FLOPs utilisation" in page.charts()
    assert "43.2%" in page.words


def test_size_does_not_grow_with_the_run(tmp_path):
    short = write_report(write_fake_run(tmp_path / "short", 500)).stat().st_size
    long = write_report(write_fake_run(tmp_path / "long", 2000)).stat().st_size
    assert long < 1.5 * short


def test_many_samples_are_thinned_evenly(tmp_path):
    write_log(tmp_path, train_record(1))
    with MetricsLog(tmp_path / "samples.jsonl") as log:
        for step in range(1, 101):
            log.append(sample_record(step))
    page = report(tmp_path)
    assert [tag for tag, _ in page.tags].count("article") == 8
    assert "8 of 100 steps" in page.words
    assert "step 1," in page.words
    assert "step 100," in page.words


def test_the_command(tmp_path):
    run_dir = write_log(tmp_path / "run", train_record(1))
    good = subprocess.run([sys.executable, "-m", "w1train.report", str(run_dir)], capture_output=True, text=True, timeout=60)
    assert good.stdout.strip() == str(run_dir / "report.html")
    bad = subprocess.run([sys.executable, "-m", "w1train.report", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert bad.returncode == 1
    assert "is no run directory: it has no metrics.jsonl" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_hover_data_is_json(tmp_path):
    page = report(write_fake_run(tmp_path / "demo", 60))
    for text in page.attributes("svg", "data-hover"):
        xs, labels = json.loads(text)
        assert len(xs) == len(labels) > 0
        assert xs == sorted(xs)
