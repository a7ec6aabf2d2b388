#!/usr/bin/env bash
# Pretrain a small model, teach it to answer questions (SFT), to decide many tokens at once (CAP) and to prefer answers (DPO), and measure
# each. `make post-training` runs this script. Steps that are done are not repeated, and training resumes where it stopped. Arguments are
# overrides of the recipes, for all trainings.
#
# Environment variables are RUNS, NPROC and VENV of launch/demo.sh.
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
data="${RUNS:-runs}/post_training-data"
# shellcheck source=launch/demo_data.sh
source "$repository/launch/demo_data.sh"
runs="$RUNS/post_training"
overrides=("$@")

tokenize() { # tokenize NAME: the text NAME.jsonl
  "$python" -m data_tools.tokenize --input "$data/$1.jsonl" --tokenizer "$data/tokenizer.json" --output "$data/$1" --overwrite
}

conversations() { # conversations NAME: the conversations or preferences NAME.jsonl
  "$python" -m data_tools.conversations --input "$data/$1.jsonl" --tokenizer "$data/tokenizer.json" --template "$data/template.jinja" \
    --output "$data/$1" --overwrite
}

train() { # train RECIPE NAME DATASET PARENT OVERRIDES...: train on a dataset from the weights of a run, or from random weights
  local recipe="$1" name="$2" dataset="$3" parent="$4"
  local weights=()
  shift 4
  if [[ -n "$parent" ]]; then weights=("training.initial_weights=$runs/$parent"); fi
  "$python" -m w1train train --nproc "$NPROC" recipe="$recipe" name="$name" runs_dir="$runs" data.tokenizer="$data/tokenizer.json" \
    data.train="$data/$dataset" data.validation="$data/${dataset}_validation" "${weights[@]}" "$@" "${overrides[@]}"
}

answer() { # answer NAME OPTIONS...: let the model of a run answer the questions
  local name="$1"
  shift
  step "answers of $name" "$runs/$name/answers.json" "$python" -m benchmarks.post_training.accuracy "$runs/$name" --data "$data" "$@"
}

step "1/8 texts and questions" "$data/questions.json" "$python" -m benchmarks.post_training.question_texts "$data"
step "2/8 characters" "$data/tokenizer.json" "$python" -m benchmarks.processes.characters "$data/tokenizer.json"
for name in text text_validation; do
  step "3/8 tokens of $name" "$data/$name.json" tokenize "$name"
done
for name in conversations conversations_validation preferences preferences_validation; do
  step "3/8 tokens of $name" "$data/$name.json" conversations "$name"
done
step "4/8 pretraining" "" train demo_pretrain demo_pretrain text ""
step "5/8 SFT" "" train demo_sft demo_sft conversations demo_pretrain
step "6/8 CAP" "" train demo_cap demo_cap conversations demo_sft
step "6/8 SFT, as long as CAP" "" train demo_cap demo_sft_longer conversations demo_sft diffusion.confidence_weight=0
step "7/8 DPO" "" train demo_dpo demo_dpo preferences demo_sft
answer demo_pretrain --thresholds
for name in demo_sft demo_sft_longer demo_cap; do answer "$name"; done
answer demo_dpo --thresholds
step "8/8 report" "" "$python" -m benchmarks.post_training.post_training_page "$runs"
printf 'The whole post-training took %d s. Look at %s\n' "$(seconds_since "$script_began")" "$runs/report.html"
