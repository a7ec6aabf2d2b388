#!/usr/bin/env bash
# Submit a run to Slurm. This runs launch.slurm in the environment of launch/bootstrap.sh, and works in any directory.
#
#   launch/slurm.sh --nodes 8 --partition gpu --time 24:00:00 -- recipe=w1_4b
#
# Environment variables:
#   VENV   the environment of launch/bootstrap.sh (default: .venv beside pyproject.toml)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
if [[ ! -x "$VENV/bin/python" ]]; then
  printf 'launch/slurm.sh: there is no %s/bin/python: make the environment with launch/bootstrap.sh, or set VENV= to yours\n' "$VENV" >&2
  exit 2
fi
exec "$VENV/bin/python" -m launch.slurm "$@"
