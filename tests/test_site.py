"""The documentation site: it builds without a warning, loads nothing from the network, and shows pictures that the code draws today."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from rich.text import Text

from docs.site import diagrams, links, pictures
from tests import browser as headless

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built strictly: a link, an anchor or a picture that leads nowhere raises, and so does a page that the navigation lacks."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(REPOSITORY / "mkdocs.yml"), strict=True, site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


class Resources(HTMLParser):
    """The addresses that a browser loads when it shows a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag in ("script", "img", "iframe"):
            self.found.append(attributes.get("src") or "")
        elif tag == "link" and attributes.get("rel") not in ("prev", "next", "canonical"):
            self.found.append(attributes.get("href") or "")


def test_pages_load_nothing_from_the_network(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    found = {address for page in pages for address in Resources(page).found}
    assert any("iframe-worker" in address for address in found)
    assert [address for address in found if re.match(r"(https?:)?//", address)] == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\(.?(?:https?:)?//[^)]*", styles) == []


@pytest.mark.skipif(headless.CHROMIUM is None, reason="no chromium on PATH")
def test_pages_are_readable_on_a_telephone_and_searched_with_the_keyboard(site):
    """A wide table scrolls in its own box, and no key of the configuration is broken into pieces."""
    with headless.browser() as browser:
        browser.open(site / "configuration.html", 400)
        assert browser.evaluate("document.documentElement.scrollWidth") == 400
        lines = "[...document.querySelectorAll('td:first-child > code')].map(key => key.getClientRects().length)"
        assert set(browser.evaluate(lines)) == {1}
        assert browser.problems == []
        browser.open(site / "quickstart.html", 1400)
        for event in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=event, key="s", code="KeyS", windowsVirtualKeyCode=83)
        assert browser.evaluate("document.activeElement.className").startswith("md-search__input")


def test_files_outside_of_docs_are_pages_or_links_to_the_checkout(site):
    attention = (site / "attention.html").read_text(encoding="utf-8")
    assert 'href="results/2026-11-22-attention-cpu.html"' in attention
    target = re.search(r'href="([^"]*visibility\.py)"', attention)
    assert target is not None
    assert (site / target[1]).resolve() == REPOSITORY / "w1train" / "attention" / "visibility.py"
    assert 'href="decisions.html"' in (site / "contributing.html").read_text(encoding="utf-8")


def test_docstrings_are_on_the_page_of_the_python_interface(site):
    page = (site / "python_reference.html").read_text(encoding="utf-8")
    assert 'id="w1train.diffusion.process.NoiseProcess"' in page
    assert "a subclass" in page.lower()


@pytest.mark.parametrize(
    ("text", "path", "page", "expected"),
    [
        ("[a](data.md#x)", "docs/health.md", "health.md", "[a](data.md#x)"),
        ("[a](../recipes/README.md)", "docs/health.md", "health.md", "[a](recipes.md)"),
        ("[a](../README.md#two)", "docs/health.md", "health.md", "[a](index.md#two)"),
        ("[a](../w1train/plan.py)", "docs/health.md", "health.md", "[a](source:w1train/plan.py)"),
        ("[a](../benchmarks/results)", "docs/health.md", "health.md", "[a](results.md)"),
        ("[a](docs/data.md)", "CONTRIBUTING.md", "contributing.md", "[a](data.md)"),
        ("[a](../../docs/data.md)", "benchmarks/results/x.md", "results/x.md", "[a](../data.md)"),
        ("[a](https://a.b/c) [b](#c) [c](mailto:d)", "docs/health.md", "health.md", "[a](https://a.b/c) [b](#c) [c](mailto:d)"),
        ("`[a](../LICENSE)`\n\n```\n[a](../LICENSE)\n```\n", "docs/health.md", "health.md", None),
    ],
)
def test_links_of_a_page_become_links_of_the_site(text, path, page, expected):
    assert links.with_links_of_site(text, path, page) == (text if expected is None else expected)


def test_a_link_to_a_file_that_does_not_exist_is_a_warning(caplog):
    links.with_links_of_site("[a](../w1train/nonesuch.py)", "docs/health.md", "health.md")
    assert caplog.messages == ["docs/health.md has a link to w1train/nonesuch.py, which does not exist"]
    assert caplog.records[0].name.startswith("mkdocs.plugins")


def test_with_an_address_of_the_repository_sources_are_linked_there():
    config = load_config(str(REPOSITORY / "mkdocs.yml"), repo_url="https://example.org/w1train/")
    assert links.source_address(config, "health.md") == "https://example.org/w1train/blob/main/"


@pytest.mark.parametrize("name", diagrams.DIAGRAMS)
def test_diagrams_are_what_the_code_draws(name):
    drawn = (diagrams.PICTURES / name).read_text(encoding="utf-8")
    assert drawn == diagrams.DIAGRAMS[name](), "draw them again: python -m docs.site.diagrams"


def test_a_terminal_is_shown_as_it_was_at_the_end():
    recorded = b"one\r\n50 %\x1b[2K\r\x1b[32m100 %\x1b[0m done\r\n\r\n"
    lines = pictures.screen_of(recorded)
    assert [line.plain for line in lines] == ["one", "100 % done"]
    assert [str(span.style.color.name) for span in lines[1].spans if span.style.color] == ["green"]


def test_the_picture_of_a_terminal_loads_no_font():
    svg = pictures.terminal_svg([Text("step 1"), Text("step 2")], "make demo")
    assert "step&#160;2" in svg
    assert "http" not in svg.replace("http://www.w3.org/", "")


def test_a_command_is_recorded_in_a_terminal():
    recorded = pictures.record(["python3", "-c", "import sys; print(sys.stdout.isatty())"])
    assert [line.plain for line in pictures.screen_of(recorded)] == ["True"]
    with pytest.raises(SystemExit, match="ended with 3"):
        pictures.record(["sh", "-c", "exit 3"])
