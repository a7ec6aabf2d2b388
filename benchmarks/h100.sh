#!/usr/bin/env bash
# Everything that needs a Hopper GPU, in under nine minutes on a bare machine with PyTorch: are the kernels right, how fast is attention,
# how fast is a step. In this order; a part that fails or runs out of time leaves what it has, and the next one begins.
# Arguments go to every part: `benchmarks/h100.sh --device cpu --tiny` is a dry run.
#
# Environment variables:
#   OUT      where reports, JSON, plots and the log go                      (default: build/h100)
#   PARTS    a folder with the pieces of benchmarks/pack_for_device.sh       (default: none; packages are there)
#   BUDGET   seconds for everything                                          (default: 530)
#   PYTHON   the Python that has PyTorch                                     (default: python3)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

OUT="${OUT:-build/h100}"
BUDGET="${BUDGET:-530}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT" || exit 1
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# Each run of the step is a process of its own: what one has compiled for cuDNN's kernels, the next need not compile again.
export FLEX_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 FLEX_ATTENTION_CUTE_DSL_CACHE_DIR="${TMPDIR:-/tmp}/w1train-h100-cute"
status=0

# part NAME SECONDS COMMAND...: at most so long, and never beyond the budget. SIGINT first: Python then reports what it has.
part() {
  local name="$1" seconds="$2" left=$((BUDGET - SECONDS)) began=$SECONDS code
  shift 2
  ((seconds < left)) || seconds=$left
  if ((seconds < 10)); then
    echo "== $name: not run, $left s are left"
    status=1
    return
  fi
  echo "== $name: at most $seconds s"
  timeout --signal=INT --kill-after=10 "$seconds" "$@"
  code=$?
  ((code == 0)) || status=1
  echo "== $name: status $code after $((SECONDS - began)) s ($SECONDS s in all)"
}

unpack() {
  local site
  site="$(mktemp -d)"
  cat "$PARTS"/site.tar.xz.* | tar -xJ -C "$site" || return 1
  # The second folder is what a .pth file would add: such files are read in Python's own folders alone.
  export PYTHONPATH="$PYTHONPATH:$site:$site/nvidia_cutlass_dsl/dsl_packages"
}

everything() {
  if [[ -n "${PARTS:-}" ]]; then
    unpack || { echo "cannot unpack $PARTS/site.tar.xz.*"; status=1; return; }
  fi
  "$PYTHON" --version
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "no nvidia-smi"
  part correctness 120 "$PYTHON" -m benchmarks.correctness --report --output "$OUT" "$@"
  part attention 190 "$PYTHON" -m benchmarks.attention --budget 130 --report --output "$OUT" "$@"
  part step 500 "$PYTHON" -m benchmarks.step --budget "$((BUDGET - SECONDS - 30))" --steps 4 --warmup 2 --report --output "$OUT" "$@"
  echo "== all: status $status after $SECONDS s, in $OUT"
}

# In this shell, for the status; the log sees the same.
everything "$@" > >(tee "$OUT/h100.log") 2>&1
wait
exit "$status"
