"""Collect the Python standard library's own sources as a corpus: python -m data_tools.python_corpus --output corpus.jsonl

A corpus of real text and code that every machine with Python has. Left out: installed packages, tests, and files that are not
UTF-8. One JSONL record {"path", "text"} a file, sorted by path.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from data_tools.command import output_file, run_command
from data_tools.text import CorpusError
from w1train.runtime.command import command
from w1train.runtime.files import write_bytes

logger = logging.getLogger(__name__)

# pydoc_data is one generated file as long as 60 others together: whichever split it falls into is no sample of the rest.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}


@command("data_tools.python_corpus")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.python_corpus",
        description="Collect the sources of the running Python's standard library as JSONL (keys path and text), without installed "
        "packages, tests and generated documentation.",
    )
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE", help="the .jsonl file to write")
    parser.add_argument("--max-bytes", type=int, help="keep at most this much text, files chosen by a hash of their path (default: all)")
    options = parser.parse_args(arguments)
    return run_command(lambda: _write(Path(options.output), options.max_bytes))


def _write(output: Path, max_bytes: int | None) -> None:
    sources = collect(Path(sysconfig.get_path("stdlib")), max_bytes)
    output.parent.mkdir(parents=True, exist_ok=True)
    records = [json.dumps({"path": path, "text": text}, ensure_ascii=False) + "\n" for path, text in sources]
    write_bytes(output, "".join(records).encode("utf-8"))
    logger.info("wrote %s: %d files, %.1f MB", output, len(records), sum(len(text.encode("utf-8")) for _, text in sources) / 1e6)


def collect(directory: Path, max_bytes: int | None = None) -> list[tuple[str, str]]:
    """(relative path, text) of the Python sources of a directory tree, sorted by path.

    With ``max_bytes``, files are taken in the order of a hash of their path, a sample that is always the same, each that still
    fits.

    Raises:
        CorpusError: if there are none.
    """
    paths = [path.relative_to(directory) for path in directory.rglob("*.py")]
    paths = [path for path in paths if not _LEFT_OUT.intersection(path.parts)]
    sources: dict[str, str] = {}
    num_bytes = num_bad = 0
    for name in sorted((path.as_posix() for path in paths), key=lambda name: hashlib.sha256(name.encode()).digest()):
        content = (directory / name).read_bytes()
        if max_bytes is not None and num_bytes + len(content) > max_bytes:
            continue
        try:
            sources[name] = content.decode("utf-8")
        except UnicodeDecodeError:
            num_bad += 1
            continue
        num_bytes += len(content)
    if num_bad:
        logger.warning("left out %d files that are not UTF-8", num_bad)
    if not num_bytes:
        raise CorpusError(f"no Python sources in {directory}" + (f" within {max_bytes} bytes" if max_bytes is not None else ""))
    return sorted(sources.items())


if __name__ == "__main__":
    sys.exit(main())
