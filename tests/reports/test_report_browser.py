"""The pages in a real browser: there are no errors, curves are visible, and everything fits on the screen of a phone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import browser as headless
from tests.browser import Browser
from tests.reports.fake_run import train_record, validation_record, write_fake_run
from w1train.reports import report_page
from w1train.reports.report_compare import write_comparison
from w1train.reports.run_report import write_report
from w1train.runtime.record_files import MetricsLog

pytestmark = pytest.mark.skipif(headless.CHROMIUM is None, reason="no chromium on PATH")

WIDTHS = (1280, 390, 320)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs, the first with every kind of event, and a long name."""
    directory = tmp_path_factory.mktemp("runs")
    first = write_fake_run(directory / "a-run-whose-name-is-longer-than-a-telephone-is-wide", 400)
    with MetricsLog(first / "metrics.jsonl") as log:
        for step in range(401, 460):
            more = {"time/communication_seconds": 0.05, "health/skipped_steps": step // 430, "checkpoint/stall_seconds": 0.2, "stage": "b"}
            log.append(train_record(step) | more | ({"loss": math.nan} if step == 440 else {}))
        log.append(validation_record(459))
    with MetricsLog(first / "events.jsonl") as log:
        for step, event in ((0, "start"), (50, "checkpoint"), (200, "checkpoint"), (200, "resume"), (400, "checkpoint")):
            log.append({"step": step, "event": event, "time": 0.0})
    other = directory / "other"
    with MetricsLog(other / "metrics.jsonl") as log:
        for step in range(301):
            record = validation_record(step) if step % 50 == 0 else train_record(step)
            higher = {key: 1.15 * value for key, value in record.items() if key.startswith(("loss", "elbo")) and key != "loss_by_t"}
            log.append(record | higher)
    return [first, other]


@pytest.fixture(scope="module")
def pages(runs) -> dict[str, Path]:
    return {"one run": write_report(runs[0]), "comparison": write_comparison(runs, runs[0] / "comparison.html")}


def color(name: str, *, dark: bool = False) -> list[int]:
    """Return red, green and blue of a colour of the page's style, which has each colour twice: first for light, then for dark."""
    found = re.findall(rf"--{name}: #(\w{{6}})", report_page._STYLE)
    return [int(found[dark][at : at + 2], 16) for at in (0, 2, 4)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["one run", "comparison"])
def test_nothing_goes_wrong_and_nothing_sticks_out(browser, pages, name, width):
    browser.open(pages[name], width)
    assert browser.problems == []
    assert browser.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    # Every chart that is shown has a size, and no text of a chart leaves the screen.
    boxes = browser.evaluate(
        "[...document.querySelectorAll('svg.chart')].filter(svg => svg.checkVisibility()).map(svg => {"
        "  const box = svg.getBoundingClientRect();"
        "  const ends = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect().right);"
        "  return [box.width, box.height, Math.max(...ends)]; })"
    )
    assert len(boxes) >= 8
    for chart_width, height, right in boxes:
        assert chart_width > 200
        assert height > 80
        assert right <= width


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["desk", "dark telephone"])
@pytest.mark.parametrize(
    ("name", "chart", "colors"),
    [
        ("one run", "ELBO, bits per byte", ["accent", "second"]),
        ("one run", "Gradient norm", ["accent"]),
        ("comparison", "Validation ELBO, bits per byte", ["series-0", "series-1"]),
        ("comparison", "Training loss, nats", ["series-0", "series-1"]),
    ],
)
def test_curves_are_seen(browser, pages, name, chart, colors, width, dark):
    """A curve over half of the plot covers at least a pixel in each column."""
    browser.open(pages[name], width, dark=dark)
    browser.evaluate(
        "[...document.querySelectorAll('svg[aria-label=\"%s\"]')].find(svg => svg.checkVisibility()).id = 'the-chart'" % chart  # noqa: UP031
    )
    columns = browser.evaluate("document.getElementById('the-chart').getBoundingClientRect().width")
    counts = browser.count_colors(browser.screenshot("#the-chart"), [color(name, dark=dark) for name in colors])
    assert min(counts) > 0.4 * columns, counts


def test_colours_are_counted_where_they_are_alone(browser, pages):
    """The test above could not fail if pixels of another colour counted too."""
    browser.open(pages["one run"], 1280)
    title = browser.screenshot("h1")
    assert browser.count_colors(title, [color("accent"), color("second")]) == [0, 0]
    assert browser.count_colors(title, [color("paper")])[0] > 1000


def test_errors_of_a_page_are_seen(browser, tmp_path):
    (tmp_path / "broken.html").write_text(
        "<script>nonesuch()</script><img src='http://127.0.0.1:1/x.png'><script>console.error(1)</script>"
    )
    browser.open(tmp_path / "broken.html", 600)
    assert any("nonesuch" in problem for problem in browser.problems)
    assert len(browser.problems) >= 2


def test_the_pointer_shows_values(browser, pages):
    browser.open(pages["comparison"], 1280)
    shown = browser.evaluate(
        "(() => { const svg = document.querySelector('svg[aria-label=\"Gradient norm\"]'), box = svg.getBoundingClientRect();"
        "  svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2, clientY: box.top + 20}));"
        "  return svg.closest('figure').querySelector('.value').textContent; })()"
    )
    assert re.fullmatch(r"tokens \d[\d.]*M: a-run-\S+ [\d.]+, other [\d.]+", shown)
