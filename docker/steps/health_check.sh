#!/usr/bin/env bash
# Check that the environment is complete. Nothing runs on the GPUs, so that training in the same container is not disturbed.
#
#   health_check.sh PREFIX [SECONDS]      (default: 100)
set -euo pipefail
prefix="${1:?health_check.sh PREFIX [SECONDS]}"
# Change to another directory: a w1train/ in the working directory would be examined instead of the installed one.
cd /
exec timeout --kill-after=5 "${2:-100}" "$prefix/bin/python" -m w1train.doctor --quick
