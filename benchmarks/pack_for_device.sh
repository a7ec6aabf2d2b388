#!/usr/bin/env bash
# Pack the packages that benchmarks/h100.sh needs in addition to PyTorch, for an x86-64 machine with Python 3.12 and no network. There are
# two files, which are small enough to be sent one at a time, and the script prints how to send them.
#
#   benchmarks/pack_for_device.sh [FOLDER]      (default: .whl, which git ignores)
#
# Environment variables:
#   PYTHON   a Python 3.12 with pip   (default: python3.12)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder="${1:-.whl}"
PYTHON="${PYTHON:-python3.12}"
# cutlass-dsl requires the libraries of CUDA 12 and 13, of which those of 13 are enough, hence --no-deps. cuda-bindings, protobuf,
# typing-extensions, tokenizers and the other packages are in the machine's image.
packages=(megatron-core==0.19.2 hydra-core==1.3.8 omegaconf==2.3.1 apache-tvm-ffi nvidia-cudnn-frontend==1.32.0
  nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1 nvidia-cutlass-dsl-libs-cu13==4.8.1)
platforms=()
for version in 2_17 2_24 2_27 2_28 2_31 2_34 2_35; do
  platforms+=(--platform "manylinux_${version}_x86_64")
done

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
  --dest "$work/wheels" "${packages[@]}"
# antlr4-python3-runtime has no wheel on PyPI.
"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$work/wheels" antlr4-python3-runtime==4.9.3
"$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$work"/wheels/*.whl

mkdir -p "$folder"
rm -f "$folder"/site.tar.xz.*
tar -C "$work/site" -cf - . | xz -6 > "$work/site.tar.xz"
split --number=2 --numeric-suffixes "$work/site.tar.xz" "$folder/site.tar.xz."
ls -l "$folder"/site.tar.xz.*
cat <<END
Send them in two calls, the second at once after the first (the machine waits 30 s):
  1. carry $folder/site.tar.xz.00:  mkdir -p /tmp/parts && cp $folder/site.tar.xz.00 /tmp/parts/
  2. carry $folder/site.tar.xz.01:  cp $folder/site.tar.xz.01 /tmp/parts/ && PARTS=/tmp/parts benchmarks/h100.sh
END
