# shellcheck shell=bash
# The second half of a job's script: it starts the ranks, passes Slurm's warning on to them, and decides what comes next. The first half,
# which launch/slurm_script.py writes, sets these variables:
: "${run:?}" "${max_failures:?}" "${requeue:?}" "${chain:?}" "${command[0]:?}" "${srun_options[0]:?}" "${status_command[0]:?}"

attempt=0
failures=0
stopping=no
warning=none # then pending, then given
step=""
status=0

say() { printf '== %s job %s: %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$SLURM_JOB_ID" "$*"; }

# --signal=B:USR1 reaches only this shell, and srun passes it on. Otherwise Slurm would signal every process of a step, helpers included.
before_the_limit() {
  stopping=yes
  if [[ "$warning" == none ]]; then warning=pending; fi
  say "Slurm's warning (SIGUSR1): the time is nearly over, the ranks save and stop"
  hand_on
}

# Pass the warning on, once: at a second signal the ranks end without a checkpoint. A process that was just forked may lose a signal, so it
# gets a second to start.
hand_on() {
  if [[ -z "$step" || "$warning" != pending ]]; then return; fi
  warning=given
  sleep 1
  kill -USR1 "$step" 2>/dev/null
}

# The job is preempted, requeued or cancelled: Slurm itself sends SIGTERM to the ranks, and kills those that are left after KillWait.
being_ended() {
  stopping=yes
  say "SIGTERM: Slurm ends the job, the ranks save and stop"
}

trap before_the_limit USR1
trap being_ended TERM

# Tell whether an earlier job of the chain has finished the run. The first job of a chain may be there to train a finished run further.
finished_before() {
  local first_job
  [[ "$chain" == yes && -f "$run/logs/chain" ]] && read -r first_job <"$run/logs/chain" && [[ "$first_job" != "$SLURM_JOB_ID" ]] &&
    "${status_command[@]}" "$run"
}

# Run the ranks, and set `status` to the highest of their exit statuses. srun runs in the background, because bash runs its traps only
# between commands and in `wait`.
run_ranks() {
  local logs console
  attempt=$((attempt + 1))
  logs="$run/logs/job_${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}_$attempt"
  mkdir -p "$logs"
  ln -sfn "${logs##*/}" "$run/logs/latest"
  export TORCH_FR_DUMP_TEMP_FILE="$logs/nccl_trace_rank_"
  say "attempt $attempt from ${before:-the start}; each rank's log is in $logs"
  # A percent sign begins a field of --output.
  srun "${srun_options[@]}" --output="${logs//%/%%}/rank_%5t.log" "${command[@]}" &
  step=$!
  hand_on
  tail --follow=name --retry --lines=+1 --sleep-interval=0.5 --pid="$step" "$logs/rank_00000.log" 2>/dev/null &
  console=$!
  # A trap ends `wait` early, with another status than srun's.
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  wait "$step"
  status=$?
  step=""
  while kill -0 "$console" 2>/dev/null; do wait "$console"; done
}

# Let Slurm start the job once more, under the same number. In a chain, the next job continues instead.
start_again() {
  if [[ "$chain" == yes ]]; then
    say "the next job of the chain resumes the run"
    exit 75
  fi
  if [[ "$requeue" == no ]]; then
    say "to resume the run, submit this job again"
    exit 75
  fi
  # Slurm ends a job that it requeues, usually before scontrol returns. This SIGTERM is not a preemption.
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

# Count the attempts in a row, over all jobs, that saved nothing: an error that comes back will come back again.
count_failures() {
  local after
  after="$(newest_checkpoint "$run")"
  failures=0
  if [[ "$after" == "$before" ]]; then
    if [[ -f "$run/logs/failures" ]]; then failures="$(<"$run/logs/failures")"; fi
    failures=$((failures + 1))
  fi
  # noclobber makes a new file or fails, so that nothing is written through a link of this name.
  rm -f "$run/logs/failures"
  (set -o noclobber && printf '%s\n' "$failures" >"$run/logs/failures")
}

main() {
  local state before
  say "run $run on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"
  if finished_before; then
    say "nothing is left to do"
    exit 0
  fi
  while true; do
    before="$(newest_checkpoint "$run")"
    # A signal may have come before there were ranks.
    if [[ "$stopping" == no ]]; then
      run_ranks
      say "the ranks ended with status $status"
      if [[ "$status" == 0 ]]; then
        say "finished"
        end_chain
        exit 0
      fi
      # The same mistake in configuration or data would be made again, and a person has ended a run that ends with 130 (Ctrl-C).
      if [[ "$status" == 2 || "$status" == 130 ]]; then
        end_chain
        exit "$status"
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
    say "failed ($failures attempts in a row without a new checkpoint; after $max_failures the job gives up): starting again in this job"
  done
}

main
