#!/usr/bin/env bash
# Create w1train's virtual environment, with the pinned uv. The base image's own packages are never changed: with SYSTEM_SITE_PACKAGES=1 the
# environment sees them, and newer versions in the environment are found before them.
#
#   create_environment.sh PREFIX
#
# Environment variables:
#   BASE_PYTHON            the interpreter to build on                    (default: python3)
#   SYSTEM_SITE_PACKAGES   1: the environment sees the base's packages    (default: 0)
set -euo pipefail
here="$(dirname "$(realpath "${BASH_SOURCE[0]}")")"
prefix="${1:?create_environment.sh PREFIX}"

options=()
if [[ "${SYSTEM_SITE_PACKAGES:-0}" == 1 ]]; then options+=(--system-site-packages); fi
"${BASE_PYTHON:-python3}" -m venv "${options[@]}" "$prefix"
# NVIDIA's images set PIP_CONSTRAINT to the versions that they were built with. The packages are installed even if the base image has them,
# because bin/uv must be the pinned one.
env -u PIP_CONSTRAINT "$prefix/bin/python" -m pip install --no-cache-dir --no-deps --ignore-installed --quiet \
  --requirement "$here/../constraints-build.txt"
# The base image's torchrun would start the base image's Python, which does not use this environment.
cat >"$prefix/bin/torchrun" <<END
#!/bin/sh
exec "$prefix/bin/python" -m torch.distributed.run "\$@"
END
chmod 755 "$prefix/bin/torchrun"
