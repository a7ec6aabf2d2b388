# shellcheck shell=bash
# How far a run has come. launch/torchrun.sh sources this file, and launch/slurm_script.py copies it into a job's script.

# Print the name of the newest checkpoint of a run, or nothing. Only the names of w1train/checkpoints/checkpoint_names.py count: a link such
# as step_latest would hide that new checkpoints are saved. The names sort by step, because the numbers have leading zeros.
newest_checkpoint() { # newest_checkpoint RUN
  local path newest=""
  for path in "$1"/checkpoints/step_[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]; do
    if [[ -d "$path" && ! -L "$path" ]]; then newest="${path##*/}"; fi
  done
  printf '%s\n' "$newest"
}
