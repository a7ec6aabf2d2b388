#!/usr/bin/env bash
# Train the same small model with every noise process on the characters of the demo's text, NPROC trainings side by side, and compare them.
# `make processes` runs this script. Steps that are done are not repeated, and training resumes where it stopped. Arguments are overrides of
# the recipe, for all trainings.
#
# Environment variables are those of launch/demo.sh, but NPROC is the number of trainings side by side, and CORPUS is JSONL with the key text.
# Documents with other characters than those of ASCII are left out.
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
data="${RUNS:-runs}/processes-data"
# shellcheck source=launch/demo_data.sh
source "$repository/launch/demo_data.sh"
runs="$RUNS/processes"

prepare_corpus 6
step "2/6 characters" "$data/tokenizer.json" "$python" -m benchmarks.processes.characters "$data/tokenizer.json"
step "3/6 tokens" "$data/validation.json" \
  "$python" -m data_tools.tokenize --input "$CORPUS" --tokenizer "$data/tokenizer.json" --output "$data/train" \
  --validation-output "$data/validation" --validation-fraction 0.05 --filter 'text=\A[\n\x20-\x7e]*\Z' --overwrite
step "4/6 trainings, $NPROC side by side" "" \
  "$python" -m benchmarks.processes.train "$runs" "$@" --data "$data" --at-once "$NPROC"
step "5/6 self-correction" "" "$python" -m benchmarks.processes.correct "$runs"
step "6/6 report" "" "$python" -m benchmarks.processes.page "$runs"
printf 'The whole comparison took %d s. Look at %s\n' "$(seconds_since "$script_began")" "$runs/report.html"
