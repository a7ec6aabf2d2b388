#!/usr/bin/env bash
# Install w1train from its source into an environment that has all required packages, and store the version of the code.
#
#   install_w1train.sh PREFIX SOURCE CODE_VERSION
set -euo pipefail
prefix="$1" source="$2" code_version="$3"

# The pinned setuptools of the environment builds it, and not the newest one.
"$prefix/bin/uv" pip install --python "$prefix/bin/python" --no-deps --no-build-isolation --compile-bytecode "$source"
rm -rf "$source/build" "$source"/*.egg-info
printf '%s\n' "$code_version" >"$prefix/CODE_VERSION"
# Change to another directory, so that the installed package is imported. numpy is tried, because a torch that was built for another version
# of it would otherwise fail in the first training step.
cd /
"$prefix/bin/python" - <<'END'
import numpy, torch, w1train, recipes, data_tools
assert torch.from_numpy(numpy.ones(3)).sum().item() == 3.0
print(f"w1train {w1train.__version__} in {w1train.__path__[0]}, torch {torch.__version__} in {torch.__path__[0]}, numpy {numpy.__version__}")
END
