#!/usr/bin/env bash
# Submit a run to Slurm: launch.slurm in the environment of launch/bootstrap.sh, from any directory.
#
#   launch/slurm.sh --nodes 8 --partition gpu --time 24:00:00 -- recipe=w1_4b
#
# Environment variables:
#   VENV   the environment of launch/bootstrap.sh (default: .venv beside pyproject.toml)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
exec "$VENV/bin/python" -m launch.slurm "$@"
