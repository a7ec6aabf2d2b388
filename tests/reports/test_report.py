"""The report must be one safe, self-contained, well-formed file, whatever the run looks like."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.reports.fake_run import (
    UNIGRAM_BITS_PER_BYTE,
    expert_values,
    sample_record,
    train_record,
    validation_record,
    write_fake_run,
    write_fake_summary,
)
from w1train.config.errors import UserError
from w1train.records.summary import add_to_summary, tokens_per_second
from w1train.reports import report_page
from w1train.reports.report_compare import write_comparison
from w1train.reports.run_report import write_report
from w1train.runtime.record_files import MetricsLog

VOID = {"meta", "br"}


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

    def charts(self) -> dict[str, dict[str, Any]]:
        """Return the data of the page's charts by their titles. NaN and infinite values are errors in it, as they are for a browser."""
        found = [json.loads(text, parse_constant=pytest.fail) for text in self.attributes("div", "data-chart")]
        return {chart["title"]: chart for chart in found}

    def curve(self, title: str, index: int = -1) -> tuple[list[float], list[float | None]]:
        """Return x and y of a chart's curve."""
        curves = [(xs, ys) for xs, *columns in self.charts()[title]["tables"] for ys in columns]
        return curves[index]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def report(run_dir: Path) -> Page:
    page = Page(write_report(run_dir).read_text())
    assert all(chart["x"] for chart in page.charts().values())
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
        "Training loss by t",
        "Validation loss by t",
        "Gradient norm",
        "Learning rate",
        "Throughput",
        "Mask ratio",
    } == set(page.charts())
    assert len(page.curve("Training loss")[1]) == 120
    assert "finished after 120 steps" in page.words
    assert "12.6M" in page.words
    assert f"unigram {UNIGRAM_BITS_PER_BYTE:.2f}" in page.words
    assert '"hidden_size": 384' in page.words
    assert "megatron-core" in page.words


def test_headline_compares_with_the_unigram_model(tmp_path):
    end = validation_record(120)["elbo_bits_per_byte"]
    words = report(write_fake_run(tmp_path / "demo", 120)).words
    assert f"{end:.3f} bits per byte on validation text" in words
    assert f"{1 - end / UNIGRAM_BITS_PER_BYTE:.1%} below" in words


def test_the_headline_says_what_its_number_bounds(tmp_path):
    run = write_fake_run(tmp_path / "demo", 40)
    add_to_summary(run, {"validation_bound": "an upper bound on <text>"})
    assert "The number is an upper bound on <text>." in report(run).words


def test_nothing_is_fetched(tmp_path):
    page = report(write_fake_run(tmp_path / "demo", 40))
    # The only address is in the comment that names uPlot.
    assert re.findall(r"\S*://\S*", page.text) == ["https://github.com/leeoniya/uPlot"]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon", page.text)
    assert [attributes for _, attributes in page.tags if {"src", "srcset"} & attributes.keys()] == []
    assert all(link.startswith("#") for link in page.attributes("a", "href"))
    assert [tag for tag, attributes in page.tags if "href" in attributes and tag != "a"] == []


def test_the_policy_allows_the_script_of_the_page_and_no_other(tmp_path):
    page = report(write_fake_run(tmp_path / "demo", 8))
    (policy,) = [value for value in page.attributes("meta", "content") if "default-src" in value]
    script = page.text[page.text.index("<script>") + len("<script>") : page.text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}';" in policy


def test_the_library_is_the_recorded_one_with_its_licence(tmp_path):
    folder = Path(report_page.__file__).parent / "assets" / "uplot"
    source = json.loads((folder / "source.json").read_text())
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in source["sha256"]} == source["sha256"]
    assert {path.name for path in folder.iterdir()} == {*source["sha256"], "source.json"}
    text = write_report(write_fake_run(tmp_path / "demo", 8)).read_text()
    assert (folder / "LICENSE").read_text() in text
    assert f"(v{source['version']})" in text


def test_the_parts_of_the_page_are_installed():
    packaged = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = Path(report_page.__file__).parent
    installed = {path for pattern in packaged["w1train.reports"] for path in folder.glob(pattern)}
    assert {path for path in (folder / "assets").rglob("*") if path.is_file()} <= installed


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


def test_experts_have_a_section_with_a_heat_map(tmp_path):
    page = report(write_log(tmp_path, *(train_record(step) | expert_values(step) for step in range(1, 120))))
    charts = page.charts()
    assert [line["name"] for line in charts["Largest load of an expert"]["lines"]] == [
        "all tokens",
        "masked",
        "other noisy",
        "clean stream",
    ]
    heat = charts["Load of each expert (x) in each layer (y), at step 100"]
    assert heat["x"] == {"label": "expert", "range": [0, 16]}
    assert (heat["cells"]["range"], heat["cells"]["label"]) == ([0, 5], "layer")
    assert [list(row) for row in zip(*heat["cells"]["columns"], strict=True)] == expert_values(100)["experts/loads"]
    assert not [title for title in charts if title.startswith("experts/")], "no number is drawn twice"


def test_a_dense_run_has_no_section_of_experts(tmp_path):
    assert "Experts" not in report(write_log(tmp_path, *(train_record(step) for step in range(1, 30)))).words


@pytest.mark.parametrize("loads", [1.0, [], [[]], [[1.0], [1.0, 2.0]], [["a"]], "x"])
def test_loads_that_are_no_table_are_refused(tmp_path, loads):
    with pytest.raises(UserError, match="experts/loads"):
        report(write_log(tmp_path, train_record(1) | {"experts/load": 1.0, "experts/loads": loads}))


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
    assert [tag for tag, _ in page.tags].count("article") == 4 + 8, "side by side, and in the list"
    assert "8 of 100 steps" in page.words
    assert "step 1," in page.words
    assert "step 100," in page.words


def test_the_command(tmp_path):
    run_dir = write_log(tmp_path / "run", train_record(1))
    good = subprocess.run([sys.executable, "-m", "w1train.report", str(run_dir)], capture_output=True, text=True, timeout=60)
    assert good.stdout.strip() == str(run_dir / "report.html")
    bad = subprocess.run([sys.executable, "-m", "w1train.report", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert bad.returncode == 2
    assert "is no run directory: it has no metrics.jsonl" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_curves_are_measured_values_and_their_means(tmp_path):
    page = report(write_log(tmp_path, *(train_record(step) for step in range(1, 61))))
    steps, losses = page.curve("Training loss", 0)
    assert steps == list(range(1, 61))
    assert losses == pytest.approx([train_record(step)["loss"] for step in range(1, 61)], rel=1e-5)
    middle = [train_record(step)["loss"] for step in (29, 30, 31)]
    assert page.curve("Training loss", 1)[1][29] == pytest.approx(math.fsum(middle) / 3, rel=1e-5)


def test_texts_become_code(tmp_path):
    """Samples of one prompt are shown before everything else, from the first step to the last."""
    run = write_fake_run(tmp_path / "demo", 80)
    with MetricsLog(run / "samples.jsonl") as log:
        log.append(sample_record(81, prompt="import"))
    page = report(run)
    part = page.text[page.text.index('id="from-noise-to-text"') : page.text.index('id="learning"')]
    assert re.findall(r"<h3>step (\d+)", part) == ["10", "30", "60", "80"]
    assert "class Queue" not in part, "one prompt"
    assert "step 81," in page.text
    write_log(tmp_path / "one", train_record(1))
    with MetricsLog(tmp_path / "one" / "samples.jsonl") as log:
        log.append(sample_record(1))
    assert "From noise to text" not in report(tmp_path / "one").words


def test_links_lead_to_sections(tmp_path):
    page = report(write_fake_run(tmp_path / "demo", 40))
    sections = page.attributes("section", "id")
    assert page.attributes("a", "href") == [f"#{name}" for name in sections]
    assert len(sections) == len(set(sections)) > 4


def test_stages_are_named_below_the_chart(tmp_path):
    names = [f"<stage>-{number}" for number in range(12)]
    records = [train_record(step) | {"stage": names[(step - 1) // 2], "block_size": 2 ** ((step - 1) // 2)} for step in range(1, 25)]
    page = report(write_log(tmp_path, *records))
    assert page.charts()["ELBO, bits per byte"]["sections"] == [[2 * index + 1, name] for index, name in enumerate(names)]
    for index, name in enumerate(names):
        assert f"{name} from {2 * index + 1}" in page.words


@pytest.mark.parametrize("finished", [True, False])
def test_the_speed_is_all_tokens_divided_by_all_time(tmp_path, finished):
    """The page of a run, running or finished, has the number that the summary has. A median would not know the slow first step."""
    slow = {"time/step_seconds": 30.0, "time/tokens_per_second": 1000.0}
    fast = {"time/step_seconds": 1.0, "time/tokens_per_second": 30_000.0}
    records = [train_record(1) | slow, *(train_record(step) | fast for step in range(2, 32))]
    run = write_log(tmp_path / "run", *records)
    assert tokens_per_second(records) == 31 * 30_000 / 60
    if finished:
        write_fake_summary(run, 31, [validation_record(0)])
    assert "tokens per second 15.5k" in report(run).words
    page = Page(write_comparison([run, run], tmp_path / "both.html").read_text())
    assert "tokens per second 15.5k 15.5k" in page.words


def luminance(color: str) -> float:
    """Return the relative luminance of a colour #RRGGBB, as the Web Content Accessibility Guidelines 2.2 define it."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_have_contrast(dark):
    """The guidelines ask for 4.5 between text and paper, and for 3 between curves and paper."""
    found = re.findall(r"--([\w-]+): (#\w{6})", report_page.style())
    half = len(found) // 2
    colors = dict(found[half:] if dark else found[:half])
    for name, color in colors.items():
        light, dim = sorted((luminance(color), luminance(colors["paper"])), reverse=True)
        ratio = (light + 0.05) / (dim + 0.05)
        least = 4.5 if name in ("ink", "muted", "accent", "bad") else 3.0
        assert ratio >= least or name in ("paper", "rule", "soft"), f"{name}: {ratio:.2f}"
