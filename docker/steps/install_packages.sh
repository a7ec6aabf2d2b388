#!/usr/bin/env bash
# Install the pinned packages that w1train needs and the environment lacks, until nothing is missing. Nothing is resolved here: the pins
# were (docker/compile_constraints.sh), and what the base image has stays wherever it will do.
#
#   install_packages.sh PREFIX PYPROJECT CONSTRAINTS EXTRAS [PROTECTED...]
#
# PROTECTED packages are the base image's or the build fails: its torch, and what was compiled against it.
# Environment variables:
#   TORCH_INDEX   a package index that torch itself is taken from, such as https://download.pytorch.org/whl/cpu   (default: none)
set -euo pipefail
here="$(dirname "$(realpath "${BASH_SOURCE[0]}")")"
prefix="$1" pyproject="$2" constraints="$3" extras="$4"
shift 4
num_rounds=12

# --no-deps, because a resolver would replace torch to please a dependency. --no-build-isolation: what has no wheel is built by the
# pinned setuptools, not by the newest.
install() { # install UV_ARGUMENTS...
  "$prefix/bin/uv" pip install --python "$prefix/bin/python" --no-deps --no-build-isolation --compile-bytecode "$@"
}

if [[ -n "${TORCH_INDEX:-}" ]]; then
  install --default-index "$TORCH_INDEX" "$(grep -E '^torch==' "$constraints")"
fi
# Each round sees the requirements of what the one before has installed.
for ((round = 1; round <= num_rounds; round++)); do
  needed="$("$prefix/bin/python" "$here/../../launch/needed_packages.py" "$pyproject" "$extras" "$constraints" "$@")"
  if [[ -z "$needed" ]]; then
    echo "install_packages: all requirements are met after $((round - 1)) rounds"
    exit
  fi
  install --requirement - <<<"$needed"
done
echo "install_packages: still missing after $num_rounds rounds: $needed" >&2
exit 1
