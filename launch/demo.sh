#!/usr/bin/env bash
# Make a trained diffusion language model from text, step by step. `make demo` runs this script, and each command also works alone. Steps
# that are done are not repeated, and training resumes where it stopped. Arguments are overrides of the recipe. Relative paths begin at the
# caller's directory.
#
# Environment variables:
#   RECIPE   the recipe that is trained                 (default: demo; demo_moe is its mixture of experts)
#   CORPUS   text: a file, a directory or JSONL        (default: the sources of Python's standard library)
#   NPROC    ranks                                     (default: 1 with one GPU, else 2)
#   RUNS     where the data and the run directory go   (default: runs)
#   VENV     the environment of launch/bootstrap.sh    (default: .venv beside pyproject.toml)
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

data="${RUNS:-runs}/demo-data"
# With merges, words and indentation are single tokens. Autoregression, with which the recipe begins, learns such tokens at once. Masked
# diffusion alone predicts only the frequencies of tokens for a thousand steps: from the first step, it needs a vocabulary of bytes.
vocab_size=2048
# shellcheck source=launch/demo_data.sh
source "$repository/launch/demo_data.sh"
RECIPE="${RECIPE:-demo}"
run="$RUNS/$RECIPE"
layout=()
# One rank has all experts, whatever the recipe says of their ranks.
if [[ "$NPROC" == 1 ]]; then layout=(parallel.expert=1); fi

prepare_data 6
step "4/6 pretraining on $NPROC ranks" "" \
  "$python" -m w1train train --nproc "$NPROC" recipe="$RECIPE" runs_dir="$RUNS" "${layout[@]}" \
  data.train="$data/train" data.validation="$data/validation" data.tokenizer="$data/tokenizer.json" "$@"
step "5/6 words of 20 samples" "" \
  "$python" -m benchmarks.words "$run"
step "6/6 report" "" \
  "$python" -m w1train report "$run" --overwrite
if [[ "$RECIPE" != demo && -e "$RUNS/demo/summary.json" ]]; then
  step "comparison with the demo" "" \
    "$python" -m w1train report "$RUNS/demo" "$run" --output "$run/comparison.html" --overwrite
fi

printf 'The whole demo took %d s. Look at %s, or generate more text:\n' "$(seconds_since "$script_began")" "$run/report.html"
printf '  %s sample %s --prompt "def main("\n' "$VENV/bin/w1train" "$run"
