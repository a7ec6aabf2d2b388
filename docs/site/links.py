"""The hook of MkDocs that connects the site with the files of the repository that are outside of docs/.

A page names another file by its path in the repository (``../recipes/README.md``), and such links work wherever the repository is shown.
In the site, some of these files are pages too. All others are links to the checkout that the site was built in or, if mkdocs.yml has a
``repo_url``, to this address.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

logger = logging.getLogger("mkdocs.plugins.links")  # MkDocs counts the warnings of loggers below its own
REPOSITORY = Path(__file__).resolve().parent.parent.parent
RESULTS = "benchmarks/results"
MOVED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "recipes/README.md": "recipes.md"}
"""The page of the site that shows a file of the repository. In place of README.md, the site has docs/index.md."""
SOURCE = "source:"
"""The scheme of links to files that are not in the site, until the page is HTML. MkDocs does not look for the target of such a link."""
_LINK = re.compile(r"```.*?^ *```|`[^`\n]*`|(?<=\]\()[^)\s]+(?=\))", re.DOTALL | re.MULTILINE)


def page_of(path: str) -> str | None:
    """Return the page of the site that shows a file of the repository, or None if no page does."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == RESULTS:
        return "results.md"
    if posixpath.dirname(path) == RESULTS and path.endswith(".md"):
        return f"results/{posixpath.basename(path)}"
    return MOVED.get(path)


def with_links_of_site(text: str, path: str, page: str) -> str:
    """Return the text of a page with its relative links changed to links of the site.

    Args:
        text: Markdown. Links in code are not changed.
        path: the file of the text in the repository.
        page: its page in the site.
    """

    def change(match: re.Match[str]) -> str:
        link, hash_sign, anchor = match[0].partition("#")
        if match[0].startswith("`") or not link or ":" in link:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        shown = page_of(target)
        if shown is None and not (REPOSITORY / target).exists():
            logger.warning("%s has a link to %s, which does not exist", path, target)
        address = posixpath.relpath(shown, posixpath.dirname(page) or ".") if shown else SOURCE + target
        return address + hash_sign + anchor

    return _LINK.sub(change, text)


def source_address(config: MkDocsConfig, page: str) -> str:
    """Return where links to files of the repository lead, seen from a page."""
    if config.repo_url:
        return f"{config.repo_url.rstrip('/')}/blob/main/"
    folder = posixpath.dirname(posixpath.join(Path(config.site_dir).as_posix(), page))
    return f"{posixpath.relpath(REPOSITORY.as_posix(), folder)}/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose text is outside of docs/."""
    results = sorted((REPOSITORY / RESULTS).glob("*.md"), reverse=True)
    outside = [path for path in MOVED if path != "README.md"] + [f"{RESULTS}/{path.name}" for path in results]
    for path in outside:
        page = page_of(path)
        assert page is not None
        text = with_links_of_site((REPOSITORY / path).read_text(encoding="utf-8"), path, page)
        files.append(File.generated(config, page, content=text))
    listing = "".join(f"- [{path.stem}](results/{path.name})\n" for path in results)
    files.append(File.generated(config, "results.md", content=f"# Results of benchmarks\n\nThe newest report is first.\n\n{listing}"))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Change the links of a page of docs/."""
    if page.file.generated_by is not None:
        return markdown
    return with_links_of_site(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Write the addresses of files that are not in the site."""
    return html.replace(f'href="{SOURCE}', f'href="{source_address(config, page.file.dest_uri)}')
