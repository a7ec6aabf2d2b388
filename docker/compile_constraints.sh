#!/usr/bin/env bash
# Write the images' pins again from pyproject.toml: constraints-gpu.txt, constraints-cpu.txt, constraints-build.txt. Review the difference.
# This needs uv and PyPI. Arguments are passed to uv (--upgrade-package NAME, --upgrade).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

compile() { # compile OUTPUT SOURCE UV_ARGUMENTS...
  local output="$1" source="$2"
  shift 2
  uv pip compile "$source" --quiet --python-version 3.12 --python-platform x86_64-manylinux_2_35 --no-annotate \
    --custom-compile-command docker/compile_constraints.sh --output-file "$output" "$@"
}

# NVIDIA's image has its own torch, which its transformer-engine and apex are built against. Neither torch nor what its wheel requires is
# pinned for it.
without_torch="$(mktemp)"
trap 'rm -f "$without_torch"' EXIT
echo "torch ; python_version < '3'" >"$without_torch"
compile docker/constraints-gpu.txt pyproject.toml --extra cudnn --extra dali --extra data --extra hf --override "$without_torch" "$@"
# The wheels of CUDA's libraries are pinned too: a torch from PyPI needs them, and a torch that is built for the CPU does not.
compile docker/constraints-cpu.txt pyproject.toml --extra data --extra hf "$@"
printf '%s\n' packaging setuptools uv | compile docker/constraints-build.txt - "$@"
