# shellcheck shell=bash
# The second half of a job's script: starts the ranks, hands them Slurm's warning, and decides what comes next. launch/slurm.py writes
# the first half, which says what to run:
: "${run:?}" "${max_failures:?}" "${requeue:?}" "${chain:?}" "${command[0]:?}" "${srun_options[0]:?}" "${status_command[0]:?}"

attempt=0
failures=0
stopping=no
warning=none # then pending, then given
step=""
status=0

say() { printf '== %s job %s: %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$SLURM_JOB_ID" "$*"; }

# --signal=B:USR1 comes to this shell alone; srun hands it on. Slurm signals every process of a step, the helpers of the ranks too.
before_the_limit() {
  stopping=yes
  if [[ "$warning" == none ]]; then warning=pending; fi
  say "Slurm's warning (SIGUSR1): the time is nearly over, the ranks save and stop"
  hand_on
}

# Once: ranks end without a checkpoint at a second one. What has just been forked may lose a signal, so it gets a second to begin.
hand_on() {
  if [[ -z "$step" || "$warning" != pending ]]; then return; fi
  warning=given
  sleep 1
  kill -USR1 "$step" 2>/dev/null
}

# Preempted, requeued or cancelled: Slurm sends SIGTERM to the ranks itself, and kills what is left after KillWait.
being_ended() {
  stopping=yes
  say "SIGTERM: Slurm ends the job, the ranks save and stop"
}

trap before_the_limit USR1
trap being_ended TERM

# Names have leading zeros, and what is half written has another name (w1train/checkpoints/checkpoint.py).
newest_checkpoint() {
  find "$run/checkpoints" -maxdepth 1 -name 'step_*' -printf '%f\n' 2>/dev/null | sort | tail -n 1
}

# Whether an earlier job of the chain has done it all. The first may be there to take a finished run further.
finished_before() {
  local first_job
  [[ "$chain" == yes && -f "$run/logs/chain" ]] && read -r first_job <"$run/logs/chain" && [[ "$first_job" != "$SLURM_JOB_ID" ]] &&
    "${status_command[@]}" "$run"
}

# Sets `status` when the ranks have ended: the highest of theirs. The shell waits instead of running srun in front, because
# bash looks at its traps only between commands and in `wait`.
run_ranks() {
  local logs console
  attempt=$((attempt + 1))
  logs="$run/logs/job_${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}_$attempt"
  mkdir -p "$logs"
  ln -sfn "${logs##*/}" "$run/logs/latest"
  export TORCH_FR_DUMP_TEMP_FILE="$logs/nccl_trace_rank_"
  say "attempt $attempt from ${before:-the start}; each rank's log is in $logs"
  # In --output a percent sign begins a field.
  srun "${srun_options[@]}" --output="${logs//%/%%}/rank_%5t.log" "${command[@]}" &
  step=$!
  hand_on
  tail --follow=name --retry --lines=+1 --sleep-interval=0.5 --pid="$step" "$logs/rank_00000.log" 2>/dev/null &
  console=$!
  # A trap ends `wait` early, with a status that is not srun's.
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  wait "$step"
  status=$?
  step=""
  while kill -0 "$console" 2>/dev/null; do wait "$console"; done
}

# Slurm starts the job once more, under its number. Jobs of a chain leave that to the next one.
start_again() {
  if [[ "$chain" == yes ]]; then
    say "the next job of the chain goes on"
    exit 75
  fi
  if [[ "$requeue" == no ]]; then
    say "to go on, submit this job again"
    exit 75
  fi
  # Slurm ends what it requeues, as a rule before scontrol is back: that is no preemption.
  trap '' TERM
  if scontrol requeue "$SLURM_JOB_ID"; then
    say "requeued"
  else
    say "could not be requeued: submit this job again"
  fi
  exit 75
}

end_chain() {
  local job
  [[ -f "$run/logs/chain" ]] || return 0
  while read -r job; do
    if [[ "$job" != "$SLURM_JOB_ID" ]]; then scancel --state=PENDING "$job"; fi
  done <"$run/logs/chain"
}

# The same end again and again is no bad luck: counts the attempts in a row, over all jobs, that saved nothing.
count_failures() {
  local after
  after="$(newest_checkpoint)"
  failures=0
  if [[ "$after" == "$before" ]]; then
    if [[ -f "$run/logs/failures" ]]; then failures="$(<"$run/logs/failures")"; fi
    failures=$((failures + 1))
  fi
  # Not through a link of that name: noclobber makes a new file or none.
  rm -f "$run/logs/failures"
  (set -o noclobber && printf '%s\n' "$failures" >"$run/logs/failures")
}

main() {
  local state before first=no
  say "run $run on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"
  if finished_before; then
    say "nothing is left to do"
    exit 0
  fi
  [[ "${SLURM_RESTART_COUNT:-0}" == 0 && -z "$(newest_checkpoint)" ]] && first=yes
  while true; do
    before="$(newest_checkpoint)"
    # The end may be asked for before there are ranks.
    if [[ "$stopping" == no ]]; then
      run_ranks
      say "the ranks ended with status $status"
      if [[ "$status" == 0 ]]; then
        say "finished"
        end_chain
        exit 0
      fi
      # A mistake of configuration or data would be one again, unless these have worked before: then something else is wrong.
      if [[ "$status" == 2 && "$first" == yes && "$attempt" == 1 ]]; then
        end_chain
        exit 2
      fi
    fi
    state="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null)"
    if [[ "${state:-RUNNING}" != RUNNING ]]; then
      say "$state: Slurm decides whether the job starts again"
      exit 75
    fi
    count_failures
    if ((failures >= max_failures)); then
      say "given up: $failures attempts in a row without a new checkpoint"
      end_chain
      exit 1
    fi
    if [[ "$status" == 75 || "$stopping" == yes ]]; then start_again; fi
    say "failed ($failures in a row without a new checkpoint; $max_failures are too many): once more, in place"
  done
}

main
