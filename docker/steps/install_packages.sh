#!/usr/bin/env bash
# Install the pinned packages that w1train needs and the environment lacks, until nothing is missing. No versions are chosen here:
# docker/compile_constraints.sh has chosen the pins, and packages of the base image stay wherever they meet the requirements.
#
#   install_packages.sh PREFIX PYPROJECT CONSTRAINTS EXTRAS [PROTECTED...]
#
# If a PROTECTED package would have to change, the build fails: the base image's torch, and what was compiled against it.
# Environment variables:
#   TORCH_INDEX   the package index for torch itself, such as https://download.pytorch.org/whl/cpu   (default: the index of all packages)
set -euo pipefail
here="$(dirname "$(realpath "${BASH_SOURCE[0]}")")"
prefix="$1" pyproject="$2" constraints="$3" extras="$4"
shift 4
num_rounds=12

# --no-deps, because a resolver would replace torch for a dependency. --no-build-isolation, so that packages without a wheel are built by
# the pinned setuptools and not by the newest one.
install() { # install UV_ARGUMENTS...
  "$prefix/bin/uv" pip install --python "$prefix/bin/python" --no-deps --no-build-isolation --compile-bytecode "$@"
}

if [[ -n "${TORCH_INDEX:-}" ]]; then
  install --default-index "$TORCH_INDEX" "$(grep -E '^torch==' "$constraints")"
fi
# Each round sees the requirements of the packages that the previous round has installed.
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
