#!/usr/bin/env bash
# Create or update the virtual environment and install w1train into it. If nothing has changed since the last call, this returns at once.
#
#   launch/bootstrap.sh                  the environment, with the development tools
#   launch/bootstrap.sh --print-python   only print the Python that it would be built on
#
# Environment variables:
#   VENV     the virtual environment                          (default: .venv beside pyproject.toml)
#   EXTRAS   extras of pyproject.toml, separated by commas    (default: dev)
#   PYTHON   the interpreter to build the environment on      (default: the first Python >= 3.12 found)
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$repository/.venv}"
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"
EXTRAS="${EXTRAS:-dev}"
PYTHON="${PYTHON:-}"

say() { printf 'bootstrap: %s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

# Print the uv on PATH, or else the one in the environment. It is run to test it: pyenv's shims are on PATH even for versions without uv.
find_uv() {
  local candidate
  for candidate in uv "$VENV/bin/uv"; do
    if "$candidate" --version >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
}

# Print one candidate on each line, the preferred candidate first. The tests run on 3.12.
python_candidates() {
  local version directory uv
  if [[ -n "$PYTHON" ]]; then
    printf '%s\n' "$PYTHON"
    return
  fi
  printf '%s\n' python3.12 python3.13 python3.14 python3 python
  for version in 3.12 3.13 3.14; do
    for directory in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*; do
      if [[ -x "$directory/bin/python3" ]]; then printf '%s\n' "$directory/bin/python3"; fi
    done
  done
  uv="$(find_uv)"
  if [[ -n "$uv" ]]; then "$uv" python find --system '>=3.12' 2>/dev/null || true; fi
}

# Print "ok PATH", or why the candidate cannot be used. The path is that of the base interpreter: with a virtual environment's path, an
# activated .venv would be built on itself.
probe() {
  "$1" -c '
import os, sys
version = ".".join(map(str, sys.version_info[:3]))
new_enough = sys.version_info >= (3, 12)
print("ok " + os.path.realpath(sys._base_executable) if new_enough else "is Python " + version)' 2>/dev/null || {
    if command -v "$1" >/dev/null; then echo "is there but does not run"; else echo "not found"; fi
  }
}

# Set `python`, or fail with a list of all candidates.
find_python() {
  local candidate answer tried=""
  while read -r candidate; do
    answer="$(probe "$candidate")"
    if [[ "$answer" == "ok "* ]]; then
      python="${answer#ok }"
      return
    fi
    tried+="
  $candidate: $answer"
  done < <(python_candidates)
  if [[ -n "$PYTHON" ]]; then fail "PYTHON=$PYTHON $answer; w1train needs Python >= 3.12"; fi
  fail "no Python >= 3.12. Tried:$tried
Looked for more under ${PYENV_ROOT:-$HOME/.pyenv}/versions (pyenv) and with uv ($(find_uv | grep . || echo 'not found')).
Install one ('uv python install 3.12', 'pyenv install 3.12', or your system's package), or name it: PYTHON=/path/to/python3.12"
}

# Print everything that the environment depends on. The list of packages is part of it, because an editable install maps each by its name.
stamp_text() {
  local base
  base="$(probe "$VENV/bin/python")"
  printf '%s\n' "$base" "PYTHON=$PYTHON" "EXTRAS=$EXTRAS" "$repository"/*/__init__.py
  cat "$repository/pyproject.toml" "$repository/launch/bootstrap.sh" | cksum
}

make_environment() {
  local uv base
  base="$(probe "$VENV/bin/python")"
  if [[ "$base" == "is Python "* ]]; then
    fail "$VENV $base, too old: remove it, or choose another place with VENV="
  elif [[ "$base" == "ok "* ]]; then
    if [[ -n "$PYTHON" && "$(probe "$PYTHON")" != "$base" ]]; then
      fail "$VENV is built on ${base#ok }, not on $PYTHON: remove it, or choose another place with VENV="
    fi
    return
  elif [[ -e "$VENV/pyvenv.cfg" ]]; then
    say "$VENV has no working Python any more: building it again"
    rm -rf "$VENV"
  elif [[ -n "$(ls -A "$VENV" 2>/dev/null)" ]]; then
    fail "$VENV is there and is no virtual environment: choose another place with VENV="
  fi
  find_python
  say "creating $VENV with $python"
  uv="$(find_uv)"
  if [[ -n "$uv" ]]; then
    "$uv" venv --quiet --python "$python" "$VENV"
  elif ! "$python" -m venv "$VENV"; then
    rm -rf "$VENV" # otherwise half an environment would count as complete next time
    fail "$python cannot create virtual environments (Debian and Ubuntu: install python3-venv), and there is no uv"
  fi
}

install_packages() {
  local uv
  uv="$(find_uv)"
  if [[ -z "$uv" ]]; then
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip >/dev/null
    say "installing uv, which is much faster than pip"
    if "$VENV/bin/python" -m pip install --quiet uv; then uv="$VENV/bin/uv"; else say "uv cannot be installed: pip installs everything"; fi
  fi
  say "installing w1train[$EXTRAS]; the first time, this downloads 3.2 GB, most of it torch with CUDA"
  if [[ -n "$uv" ]]; then
    # uv does not read pip's settings. A mirror that is set for pip is used by uv too.
    if [[ -n "${PIP_INDEX_URL:-}" ]]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"; fi
    # Compile bytecode now, on all cores. Otherwise each of the first processes compiles torch by itself or, if Python writes no bytecode,
    # every process does, which takes ten seconds of CPU.
    "$uv" pip install --compile-bytecode --python "$VENV/bin/python" --editable "${repository}[$EXTRAS]"
  else
    "$VENV/bin/python" -m pip install --editable "${repository}[$EXTRAS]"
  fi
}

main() {
  local stamp="$VENV/.bootstrap-stamp"
  if [[ "${1:-}" == "--print-python" ]]; then
    find_python
    printf '%s\n' "$python"
    return
  elif (($# > 0)); then
    fail "unknown argument '$1'; the only one is --print-python"
  fi
  # Without a lock, two calls of make would install into one environment at once. The lock is on a file that exists anyway.
  exec 9<"$repository/pyproject.toml"
  if command -v flock >/dev/null; then flock 9; fi
  if [[ -f "$stamp" && "$(stamp_text)" == "$(cat "$stamp")" ]]; then return; fi
  make_environment
  rm -f "$stamp" # an installation that was interrupted must be repeated
  install_packages
  stamp_text >"$stamp"
  say "ready: $VENV"
}

main "$@"
