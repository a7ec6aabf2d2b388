#!/usr/bin/env bash
# Install w1train from its source into an environment that has what it needs, and note the version of the code.
#
#   install_w1train.sh PREFIX SOURCE CODE_VERSION
set -euo pipefail
prefix="$1" source="$2" code_version="$3"

# Built by the pinned setuptools of the environment, not by the newest.
"$prefix/bin/uv" pip install --python "$prefix/bin/python" --no-deps --no-build-isolation --compile-bytecode "$source"
rm -rf "$source/build" "$source"/*.egg-info
printf '%s\n' "$code_version" >"$prefix/CODE_VERSION"
# From a folder of no meaning, so that it is the installed package that is found. numpy: a torch that was built for another generation
# of it says so here, not in the first training step.
cd /
"$prefix/bin/python" - <<'END'
import numpy, torch, w1train, recipes, data_tools
assert torch.from_numpy(numpy.ones(3)).sum().item() == 3.0
print(f"w1train {w1train.__version__} in {w1train.__path__[0]}, torch {torch.__version__} in {torch.__path__[0]}, numpy {numpy.__version__}")
END
