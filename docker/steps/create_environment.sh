#!/usr/bin/env bash
# Create the virtual environment that w1train lives in, with the pinned uv. The base image's own packages are never written to: with
# SYSTEM_SITE_PACKAGES=1 the environment sees them, and what it needs newer lies in front of them.
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
# NVIDIA's images set PIP_CONSTRAINT to what they were built with. Installed even if the base has them: bin/uv must be this one.
env -u PIP_CONSTRAINT "$prefix/bin/python" -m pip install --no-cache-dir --no-deps --ignore-installed --quiet \
  --requirement "$here/../constraints-build.txt"
# The base image's torchrun would start the base image's Python, which knows nothing of this environment.
cat >"$prefix/bin/torchrun" <<END
#!/bin/sh
exec "$prefix/bin/python" -m torch.distributed.run "\$@"
END
chmod 755 "$prefix/bin/torchrun"
