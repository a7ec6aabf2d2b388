#!/usr/bin/env bash
# Is the environment whole? Starts nothing on the GPUs, so it disturbs no training beside it.
#
#   health_check.sh PREFIX [SECONDS]      (default: 100)
set -euo pipefail
prefix="${1:?health_check.sh PREFIX [SECONDS]}"
# From a folder of no meaning: a w1train/ in the working directory would be the one that is looked at.
cd /
exec timeout --kill-after=5 "${2:-100}" "$prefix/bin/python" -m w1train.doctor --quick
