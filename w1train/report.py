"""python -m w1train.report RUN: write RUN/report.html from what the run has left so far."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from w1train.config.errors import UserError
from w1train.training.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m w1train.report", description="Write RUN/report.html, one file to look at anywhere.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory; a run that is still going on will do")
    parser.add_argument("--compare", type=Path, metavar="RUN", help="another run, whose validation is drawn beside this one's")
    arguments = parser.parse_args()
    try:
        print(write_report(arguments.run, arguments.compare))
    except (OSError, UserError) as error:
        sys.exit(f"w1train.report: {error}")


if __name__ == "__main__":
    main()
