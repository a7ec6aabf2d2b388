#!/usr/bin/env bash
# Submit a run to Slurm. This runs launch.slurm in the environment of launch/bootstrap.sh. It works in any directory, and relative paths
# begin at the caller's directory.
#
#   launch/slurm.sh --nodes 8 --partition gpu --time 24:00:00 -- recipe=w1_4b
#
# Environment variables:
#   VENV   the environment of launch/bootstrap.sh (default: .venv beside pyproject.toml)
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$repository/.venv}"
if [[ ! -x "$VENV/bin/python" ]]; then
  printf 'launch/slurm.sh: there is no %s/bin/python: make the environment with launch/bootstrap.sh, or set VENV= to yours\n' "$VENV" >&2
  exit 2
fi
# -P: a module of the same name in the caller's directory would come first otherwise.
PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}" exec "$VENV/bin/python" -P -m launch.slurm "$@"
