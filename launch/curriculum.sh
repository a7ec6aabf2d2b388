#!/usr/bin/env bash
# Train an autoregressive model and convert it to block diffusion by LLaDA2.0's block-size curriculum. Beside it, train block diffusion from
# scratch on as many tokens. `make curriculum` runs this script. Steps that are done are not repeated, and training resumes where it
# stopped. Arguments are overrides of the recipe, for both runs.
#
# Environment variables and the corpus are those of launch/demo.sh.
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# The vocabulary has merges, as the demo's: which tokens are neighbours is then worth learning, and autoregression, whose input is the
# neighbour itself, learns it at once.
data="${RUNS:-runs}/curriculum-data"
vocab_size=1024
# shellcheck source=launch/demo_data.sh
source "$repository/launch/demo_data.sh"
run="$RUNS/curriculum"
scratch="$RUNS/curriculum-scratch"

train() { # train NAME SCHEDULE OVERRIDES...
  local name="$1" schedule="$2"
  shift 2
  "$python" -m w1train train --nproc "$NPROC" recipe=curriculum schedule="$schedule" name="$name" \
    runs_dir="$RUNS" data.train="$data/train" data.validation="$data/validation" data.tokenizer="$data/tokenizer.json" "$@"
}

prepare_data 6
step "4/6 the curriculum, on $NPROC ranks" "" train curriculum curriculum "$@"
step "5/6 from scratch, on $NPROC ranks" "" train curriculum-scratch block_16 \
  validation.interval=50 checkpoint.interval=50 checkpoint.keep_best=0 checkpoint.average_at_end=false "$@"
step "6/6 report" "" "$python" -m w1train report "$run" --compare "$scratch" --overwrite
"$python" -m benchmarks.curriculum "$run" "$scratch"
printf 'The whole curriculum took %d s. Look at %s\n' "$(seconds_since "$script_began")" "$run/report.html"
