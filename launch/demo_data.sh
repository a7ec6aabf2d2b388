# The corpus, tokenizer and tokens of the demo, and steps that are not repeated. launch/demo.sh, launch/curriculum.sh and launch/processes.sh
# source this script. They set $repository and $data, the directory for these files, and for prepare_data $vocab_size. Variables of the user's
# environment with these names are not used.
# shellcheck shell=bash

CORPUS="${CORPUS:-}"
RUNS="${RUNS:-runs}"
: "${repository:?}" "${data:?}"
VENV="${VENV:-$repository/.venv}"
python="$VENV/bin/python"
# The programs are those of this repository. Without PYTHONSAFEPATH, a module of the same name in the caller's directory would come first.
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1

# The recipe's batch is 16 sequences in micro-batches of 8: two ranks at most.
default_ranks() {
  local num_gpus=0
  if command -v nvidia-smi >/dev/null; then num_gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"; fi
  if [[ "$num_gpus" == 1 ]]; then echo 1; else echo 2; fi
}

# Print the seconds of a clock that is never set. bash's own SECONDS follows the time of day, and jumps with it.
uptime_seconds() {
  local uptime rest
  read -r uptime rest </proc/uptime
  printf '%s\n' "${uptime%.*}"
}
# shellcheck disable=SC2034 # the scripts that source this file use it
script_began="$(uptime_seconds)"

seconds_since() { # seconds_since BEGIN
  printf '%s\n' $(($(uptime_seconds) - $1))
}

step() { # step TITLE OUTPUT COMMAND...: run the command, unless its output exists
  local title="$1" output="$2" begin
  begin="$(uptime_seconds)"
  shift 2
  if [[ -n "$output" && -e "$output" ]]; then
    printf '== %s: done before (%s)\n' "$title" "$output"
    return
  fi
  printf '== %s\n' "$title"
  "$@"
  printf '== %s: %d s\n\n' "$title" "$(seconds_since "$begin")"
}

# A run depends on its tokenizer and data, so another corpus needs another directory. As long as neither exists, the corpus may change: it
# may have been mistyped.
check_corpus() {
  local source="${CORPUS:-Python standard library}"
  mkdir -p "$data"
  if [[ (-e "$data/tokenizer.json" || -e "$data/validation.json") && -e "$data/source.txt" && "$(cat "$data/source.txt")" != "$source" ]]; then
    printf 'error: %s was made from: %s\nChoose another directory (RUNS=other), or remove %s and the runs in %s.\n' \
      "$data" "$(cat "$data/source.txt")" "$data" "$RUNS" >&2
    exit 1
  fi
  rm -f "$data/source.txt" # it may be a link to a stranger's file
  printf '%s\n' "$source" >"$data/source.txt"
}

prepare_corpus() { # prepare_corpus NUM_STEPS: do the first of so many steps, and let CORPUS name the text
  local num_steps="$1"
  check_corpus
  if [[ -z "$CORPUS" ]]; then
    step "1/$num_steps corpus" "$data/corpus.jsonl" \
      "$python" -m data_tools.python_corpus --output "$data/corpus.jsonl"
    CORPUS="$data/corpus.jsonl"
  else
    printf '== 1/%s corpus: %s\n' "$num_steps" "$CORPUS"
  fi
}

prepare_data() { # prepare_data NUM_STEPS: do the first three of so many steps
  local num_steps="$1"
  prepare_corpus "$num_steps"
  step "2/$num_steps tokenizer" "$data/tokenizer.json" \
    "$python" -m data_tools.train_tokenizer --input "$CORPUS" --output "$data/tokenizer.json" --vocab-size "${vocab_size:?}"
  step "3/$num_steps tokens" "$data/validation.json" \
    "$python" -m data_tools.tokenize --input "$CORPUS" --tokenizer "$data/tokenizer.json" --output "$data/train" \
    --validation-output "$data/validation" --validation-fraction 0.05 --overwrite
}

NPROC="${NPROC:-$(default_ranks)}"
# Ranks on the CPU share its cores, and with more than one thread each they would wait for one another. On GPUs it makes no difference.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
