#!/usr/bin/env bash
# Run all benchmarks that need a Hopper GPU, in under nine minutes on a machine that has only PyTorch: whether the kernels are right, how
# fast attention is, and how fast a step is, in this order. A part that fails or runs out of time reports what it has, and the next one
# begins.
# Arguments are passed to every part: `benchmarks/h100.sh --device cpu --tiny` is a dry run.
#
# Environment variables:
#   OUT      directory of reports, JSON, plots and the log                   (default: build/h100)
#   PARTS    directory with the files of benchmarks/pack_for_device.sh       (default: the packages are installed)
#   BUDGET   seconds for all parts                                           (default: 530)
#   PYTHON   the Python that has PyTorch                                     (default: python3)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

OUT="${OUT:-build/h100}"
BUDGET="${BUDGET:-530}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT" || exit 1
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# Each run of the step is a process of its own. With a cache, a run need not compile cuDNN's kernels that an earlier run has compiled.
export FLEX_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 FLEX_ATTENTION_CUTE_DSL_CACHE_DIR="${TMPDIR:-/tmp}/w1train-h100-cute"
status=0

# part NAME SECONDS COMMAND...: run a command for at most so long, within the budget. It gets SIGINT first, and Python then reports what it
# has.
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
  # A .pth file would add the second directory, but Python reads such files only in its own directories.
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

# It runs in this shell, which needs the status, and its output is logged too.
everything "$@" > >(tee "$OUT/h100.log") 2>&1
wait
exit "$status"
