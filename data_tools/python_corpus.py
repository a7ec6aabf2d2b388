"""The command that makes a corpus of the sources of Python's standard library: w1train data python-corpus --output corpus.jsonl

Every machine with Python has this corpus of real text and code. Installed packages, tests, tables, and files that are not UTF-8 are left
out. The corpus has one JSONL record {"path", "text"} for each file, sorted by path.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import hashlib
import json
import logging
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from data_tools.command_runner import run_command
from data_tools.corpus_options import output_file
from w1train.config.argument_parser import ArgumentParser
from w1train.data.text.file_names import CorpusError
from w1train.runtime.command import command
from w1train.runtime.files import errors_named, write_bytes
from w1train.runtime.output_files import require_writable

logger = logging.getLogger(__name__)

# pydoc_data is one generated file, as long as 60 others together. The split that gets it would not be a sample of the other files.
# encodings has a hundred tables of characters, which are no code, and resemble each other, so that held-out tables would be known tables.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__"}
# Tables that a program wrote: the variables of the interpreter's Makefile, and the names of characters in HTML.
_GENERATED = ("_sysconfigdata_*.py", "html/entities.py")


@command("w1train data python-corpus")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = ArgumentParser(
        prog="w1train data python-corpus",
        description="Collect the sources of the running Python's standard library as JSONL (keys path and text), without installed "
        "packages, tests, tables and generated documentation.",
    )
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE", help="the .jsonl file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files, but never an input")
    parser.add_argument(
        "--max-bytes", type=int, help="keep at most this many bytes of text, in files chosen by a hash of their paths (default: all files)"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _write(Path(options.output), options.max_bytes, options.overwrite))


def _write(output: Path, max_bytes: int | None, overwrite: bool) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    require_writable([output], library.rglob("*.py"), overwrite=overwrite)
    sources = collect(library, max_bytes)
    output.parent.mkdir(parents=True, exist_ok=True)
    records = [json.dumps({"path": path, "text": text}, ensure_ascii=False) + "\n" for path, text in sources]
    write_bytes(output, "".join(records).encode("utf-8"))
    logger.info("wrote %s: %d files, %.1f MB", output, len(records), sum(len(text.encode("utf-8")) for _, text in sources) / 1e6)


def collect(directory: Path, max_bytes: int | None = None) -> list[tuple[str, str]]:
    """Return the relative path and the text of the Python sources in a directory tree, sorted by path.

    With ``max_bytes``, files are taken in the order of a hash of their paths, as long as each still fits, so that the choice is always the
    same.

    Raises:
        CorpusError: if there is no file to take.
    """
    paths = [path.relative_to(directory) for path in directory.rglob("*.py")]
    paths = [path for path in paths if not _LEFT_OUT.intersection(path.parts) and not any(path.match(table) for table in _GENERATED)]
    sources: dict[str, str] = {}
    num_bytes = num_bad = 0
    for name in sorted((path.as_posix() for path in paths), key=lambda name: hashlib.sha256(name.encode()).digest()):
        with errors_named(directory / name):
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
