"""The command that writes a page about a run, or a page that compares several runs: w1train report RUN [RUN...]."""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

from collections.abc import Iterator, Sequence
from pathlib import Path

from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.reports.report_compare import write_comparison
from w1train.reports.report_page import shows_runs
from w1train.reports.run_report import REPORT_NAME, write_report
from w1train.runtime.command import command, describe_error
from w1train.runtime.exit_status import ExitStatus
from w1train.runtime.output_files import require_writable


@command("w1train report")
def main(words: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, 1 if a file cannot be read or written, 2 for bad input; the reason is on stderr."""
    parser = ArgumentParser(
        prog="w1train report",
        description="Write RUN/report.html, or for several runs, comparison.html in the directory of the first. Each page is one file.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory; the run may still be training")
    parser.add_argument("--compare", type=Path, metavar="RUN", help="another run, whose validation is drawn into the page of a single RUN")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file of the comparison of several runs")
    parser.add_argument("--overwrite", action="store_true", help="replace any file with the name of the page, but never a file of a run")
    arguments = parser.parse_args(words)
    several = len(arguments.runs) > 1
    if several and arguments.compare is not None:
        parser.error("--compare needs a single RUN; several RUNs are compared with each other without it")
    if not several and arguments.output is not None:
        parser.error("--output needs several RUNs; the page of a single RUN is RUN/report.html")
    try:
        shown = [*arguments.runs, *([arguments.compare] if arguments.compare else [])]
        page = arguments.output or arguments.runs[0] / ("comparison.html" if several else REPORT_NAME)
        files = (path for run in shown for path in _files(run) if path.suffix != ".html")
        is_update = arguments.output is None and shows_runs(page, shown)
        require_writable([page], files, overwrite=arguments.overwrite or is_update)
        if several:
            print(write_comparison(arguments.runs, page))
        else:
            print(write_report(arguments.runs[0], arguments.compare))
    except (UserError, FileNotFoundError) as error:
        return _refuse(error, ExitStatus.MISTAKE)
    except OSError as error:
        return _refuse(error, ExitStatus.FAILED)
    return 0


def _refuse(error: Exception, status: int) -> int:
    print(f"w1train report: {describe_error(error)}", file=sys.stderr)
    return status


def _files(run: Path) -> Iterator[Path]:
    """Yield the files of a run, also those behind links to directories: its checkpoints may be on another disk."""
    directories, seen = [run], set()
    while directories:
        place = os.path.realpath(directories.pop())
        if place in seen or not os.path.isdir(place):
            continue
        seen.add(place)
        for path in Path(place).iterdir():
            if path.is_dir():
                directories.append(path)
            else:
                yield path


if __name__ == "__main__":
    sys.exit(main())
