"""The pages in a real browser: there are no errors, curves are visible, and everything fits on the screen of a phone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests import browser as headless
from tests.browser import Browser
from tests.reports.fake_run import expert_values, train_record, validation_record, write_fake_run
from w1train.reports import report_page
from w1train.reports.report_compare import write_comparison
from w1train.reports.run_report import write_report
from w1train.runtime.record_files import MetricsLog

pytestmark = pytest.mark.skipif(headless.CHROMIUM is None, reason="no chromium on PATH")

WIDTHS = (1400, 400, 320)


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
            log.append(train_record(step) | more | expert_values(step) | ({"loss": math.nan} if step == 440 else {}))
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
    found = re.findall(rf"--{name}: #(\w{{6}})", report_page.style())
    return [int(found[dark][at : at + 2], 16) for at in (0, 2, 4)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["one run", "comparison"])
def test_nothing_goes_wrong_and_nothing_sticks_out(browser, pages, name, width):
    browser.open(pages[name], width)
    assert browser.problems == []
    assert browser.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    assert browser.evaluate("performance.getEntriesByType('resource').length") == 0
    boxes = browser.evaluate(
        "[...document.querySelectorAll('.plot')].map(plot => {"
        "  const box = plot.querySelector('.uplot').getBoundingClientRect();"
        "  const ends = [...plot.querySelectorAll('.decorations *')].map(part => part.getBoundingClientRect().right);"
        "  return [box.width, box.height, Math.max(box.right, ...ends)]; })"
    )
    assert len(boxes) >= 8
    for chart_width, height, right in boxes:
        assert chart_width > 200
        assert height > 80
        assert right <= width


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (400, True)], ids=["desk", "dark telephone"])
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
    browser.evaluate(f"{chart_named(chart)}.id = 'the-chart'")
    columns = browser.evaluate("document.getElementById('the-chart').getBoundingClientRect().width")
    counts = browser.count_colors(browser.screenshot("#the-chart"), [color(name, dark=dark) for name in colors])
    assert min(counts) > 0.4 * columns, counts


def test_colours_are_counted_where_they_are_alone(browser, pages):
    """The test above could not fail if pixels of another colour counted too."""
    browser.open(pages["one run"], 1400)
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


def chart_named(title: str) -> str:
    """Return the JavaScript expression of a chart."""
    return f"[...document.querySelectorAll('.plot')].find(plot => JSON.parse(plot.dataset.chart).title === {json.dumps(title)})"


def point_at(browser: Browser, title: str, x: float, y: float = 0.5) -> tuple[float, float]:
    """Move the mouse over a chart, to a place in parts of its width and its height. Return the place in pixels."""
    left, top, width, height = browser.evaluate(
        f"(() => {{ const over = {chart_named(title)}.querySelector('.u-over'); over.scrollIntoView({{block: 'center'}});"
        "  const box = over.getBoundingClientRect(); return [box.left, box.top, box.width, box.height]; })()"
    )
    at = (left + x * width, top + y * height)
    mouse(browser, "mouseMoved", at)
    return at


def mouse(browser: Browser, kind: str, at: tuple[float, float], clicks: int = 1) -> None:
    browser.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=clicks)


def press(browser: Browser, *keys: str) -> None:
    for key in keys:
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)
    # Charts are drawn before the next frame.
    browser.evaluate("new Promise(requestAnimationFrame)")


def first_step(browser: Browser, title: str) -> float:
    """Return the least x that a chart shows, as its keyboard tells it."""
    browser.evaluate(f"{chart_named(title)}.focus({{focusVisible: true}})")
    press(browser, "Home")
    return browser.evaluate("Number(document.activeElement.ariaValueNow)")


def test_the_pointer_shows_values(browser, pages):
    browser.open(pages["comparison"], 1400)
    point_at(browser, "Gradient norm", 0.5)
    shown = browser.evaluate(f"{chart_named('Gradient norm')}.querySelector('.tip').innerText.replace(/\\s+/g, ' ')")
    assert re.fullmatch(r"\d[\d.]*M tokens a-run-\S+ [\d.]+ other [\d.]+", shown)
    box = browser.evaluate(f"{chart_named('Gradient norm')}.querySelector('.tip').getBoundingClientRect().toJSON()")
    assert box["height"] > 20


def test_a_value_from_elsewhere_says_where_it_was_measured(browser, pages):
    browser.open(pages["one run"], 1400)
    point_at(browser, "ELBO, bits per byte", 0.25)
    shown = browser.evaluate(f"{chart_named('ELBO, bits per byte')}.querySelector('.tip').innerText.replace(/\\s+/g, ' ')")
    assert re.fullmatch(r"step 11\d training [\d.]+ validation [\d.]+ at step 100", shown)


def test_dragging_zooms_all_charts_and_a_double_click_shows_all(browser, pages):
    browser.open(pages["one run"], 1400)
    assert first_step(browser, "Gradient norm") == 1
    start = point_at(browser, "Training loss", 0.4)
    mouse(browser, "mousePressed", start)
    end = point_at(browser, "Training loss", 0.6)
    mouse(browser, "mouseReleased", end)
    assert 170 < first_step(browser, "Training loss") < 200
    assert 170 < first_step(browser, "Gradient norm") < 200
    point_at(browser, "Training loss", 0.5)
    for clicks in (1, 2):
        mouse(browser, "mousePressed", end, clicks)
        mouse(browser, "mouseReleased", end, clicks)
    assert first_step(browser, "Gradient norm") == 1
    assert browser.problems == []


def test_the_keyboard_shows_values_and_zooms(browser, pages):
    browser.open(pages["one run"], 1400)
    browser.evaluate(f"{chart_named('Training loss')}.focus({{focusVisible: true}})")
    texts = [browser.evaluate("document.activeElement.ariaValueText")]
    for key in ("ArrowLeft", "ArrowLeft", "ArrowRight", "Home"):
        press(browser, key)
        texts.append(browser.evaluate("document.activeElement.ariaValueText"))
    assert [text.partition(":")[0] for text in texts] == ["step 459", "step 458", "step 457", "step 458", "step 1"]
    assert re.fullmatch(r"step 1: [\d.]+", texts[-1])
    press(browser, "End", "+", "+")
    assert first_step(browser, "Training loss") > 250
    press(browser, "Escape")
    assert first_step(browser, "Training loss") == 1
    browser.evaluate(f"{chart_named('Training loss by t')}.focus({{focusVisible: true}})")
    press(browser, "ArrowUp")
    assert re.fullmatch(r"step \d+: t 0\.\d+ [\d.]+", browser.evaluate("document.activeElement.ariaValueText"))


def test_a_button_makes_the_axis_logarithmic(browser, pages):
    browser.open(pages["one run"], 1400)
    title = "Training loss"
    button = f"{chart_named(title)}.closest('figure').querySelector('[aria-pressed]')"

    def ascent() -> float:
        """Return how far below the middle of the chart the value is that is shown in the middle of the run."""
        point_at(browser, title, 0.5)
        return browser.evaluate(f"{chart_named(title)}.querySelector('.u-cursor-pt:not(.u-off)').getBoundingClientRect().top")

    before = ascent()
    browser.evaluate(f"{button}.click()")
    assert browser.evaluate(f"{button}.ariaPressed") == "true"
    assert ascent() != before
    browser.evaluate(f"{button}.click()")
    assert ascent() == before
    assert browser.problems == []


@pytest.fixture(scope="module")
def many_stages(tmp_path_factory) -> Path:
    """A run of a dozen stages, from three steps to a third of the run."""
    lengths = (3, 3, 6, 10, 20, 30, 30, 60, 200, 200, 30, 8)
    names = [f"{index}-block-{2**index}" for index, length in enumerate(lengths) for _ in range(length)]
    run = tmp_path_factory.mktemp("stages")
    with MetricsLog(run / "metrics.jsonl") as log:
        for step, name in enumerate(names, start=1):
            log.append(train_record(step) | {"stage": name, "block_size": 2 ** int(name.partition("-")[0])})
    return write_report(run)


@pytest.mark.parametrize(("width", "num_named"), [(1400, 3), (400, 1)])
def test_names_of_stages_do_not_overlap(browser, many_stages, width, num_named):
    browser.open(many_stages, width)
    labels = browser.evaluate(
        "[...document.querySelectorAll('.decorations .section')].map(label => {"
        "  const box = label.getBoundingClientRect(); return [label.textContent, box.left, box.right, box.top]; })"
    )
    assert len(labels) >= 3
    assert sum(" " in text for text, *_ in labels) >= num_named
    for (_, _, right, _), (_, left, _, _) in pairwise(labels):
        assert right <= left
    listed = browser.evaluate("[...document.querySelectorAll('ol.sections li')].map(item => item.innerText)")
    assert len(listed) == 12
    assert "7-block-128 from 103" in listed[7]


def test_a_name_is_never_markup(browser, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    runs = [write_fake_run(tmp_path / name, 30), write_fake_run(tmp_path / "plain", 30)]
    browser.open(write_comparison(runs, tmp_path / "c.html"), 1400)
    point_at(browser, "Gradient norm", 0.5)
    assert name in browser.evaluate(f"{chart_named('Gradient norm')}.querySelector('.tip').innerText")
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    # The policy stops a script that is not the page's own.
    browser.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hit = true'}))")
    assert browser.evaluate("window.hit ?? null") is None
    assert any("Content Security Policy" in problem for problem in browser.problems)


def test_colours_follow_the_screen(browser, pages):
    """A page that is open when the evening comes."""
    browser.open(pages["one run"], 1400)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.evaluate("new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    # A screenshot would resize the page, and charts are drawn again then.
    pixels = browser.evaluate(
        f"(() => {{ const canvas = {chart_named('Gradient norm')}.querySelector('canvas');"
        "  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
        f"  const color = {color('accent', dark=True)};"
        "  return [...Array(data.length / 4).keys()].filter(at =>"
        "    data[4 * at + 3] > 200 && color.every((part, index) => Math.abs(data[4 * at + index] - part) < 8)).length; })()"
    )
    assert pixels > 100
