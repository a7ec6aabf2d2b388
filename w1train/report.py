"""python -m w1train.report RUN [RUN...]: a page about a run, or one that compares several, from what they have left so far."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from w1train.config.errors import UserError
from w1train.reports.report_compare import write_comparison
from w1train.reports.run_report import write_report
from w1train.runtime.command import command, describe_error


@command("w1train.report")
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m w1train.report",
        description="Write RUN/report.html, one file to look at anywhere; of several runs, the first one's comparison.html.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory; a run that is still going on will do")
    parser.add_argument("--compare", type=Path, metavar="RUN", help="another run, whose validation is drawn in the page of one RUN")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the comparison of several runs is written")
    arguments = parser.parse_args()
    several = len(arguments.runs) > 1
    if several and arguments.compare is not None:
        parser.error("--compare goes with one RUN; several are compared with each other anyway")
    if not several and arguments.output is not None:
        parser.error("--output goes with several RUNs; the page of one is RUN/report.html")
    try:
        if several:
            print(write_comparison(arguments.runs, arguments.output or arguments.runs[0] / "comparison.html"))
        else:
            print(write_report(arguments.runs[0], arguments.compare))
    except (OSError, UserError) as error:
        sys.exit(f"w1train.report: {describe_error(error)}")


if __name__ == "__main__":
    main()
