"""The command `w1train`, as `python -m w1train`."""

import sys

from w1train.cli import main

sys.exit(main())
