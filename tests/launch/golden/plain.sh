#!/bin/bash
# Trains w1_4b with w1train; written by python -m launch.slurm, which submits it. By hand: sbatch THIS_FILE
#SBATCH --job-name=w1_4b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@160
#SBATCH --chdir=/home/me/w1train
#SBATCH --output=/home/me/w1train/runs/w1_4b/logs/slurm_%j.log
#SBATCH --open-mode=append
#SBATCH --requeue

set -uo pipefail
run=/home/me/w1train/runs/w1_4b
max_failures=3
requeue=yes
chain=no
srun_options=(
  --kill-on-bad-exit=0
  --wait=120
  --gpu-bind=none
)
command=(
  /home/me/.venv/bin/python
  -m
  w1train.pretrain
  recipe=w1_4b
)
status_command=(
  /home/me/.venv/bin/python
  -m
  w1train.status
)

# What the ranks find in their environment. launch/torchrun.sh sources this file, launch/slurm.py copies it into the job's script.
# A value of yours wins: export it before, or give it to launch.slurm with --env.

# Threads of a rank's CPU operators. Unset, each rank takes all cores, and eight ranks a node fight for them; what a rank does on the
# CPU (packing, logging) gains nothing from more. Data loading has workers of its own (data.num_workers).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Python's output reaches the log at once, and a crash in native code (SIGSEGV, SIGABRT) leaves the Python stack there.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"

# One hardware queue up to Hopper: kernels start in the order of their launch, so that a collective launched before a matrix product is not
# kept waiting behind it. Megatron's overlap of tensor and context parallelism counts on that order. Blackwell wants the default (8).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Segments that grow instead of blocks that are too small for the next shape: packed batches differ from step to step, and would fragment.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# NCCL says what goes wrong, and its version. INFO adds topology and transports (where traffic goes): the first thing to look at
# when collectives are slow. Its own choices (NCCL_ALGO, NCCL_PROTO, NCCL_NVLS_ENABLE, NCCL_IB_*) are left alone: docs/cluster.md says
# when to set them. Where a node has several networks, gloo may take the wrong one: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name it.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# The flight recorder: the last collectives of each rank, with their Python stacks, kept in memory and written out when one times out.
# `torchfrtrace` compares the files of all ranks and names the rank that is missing or in another collective.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_FR_DUMP_ON_TIMEOUT="${TORCH_FR_DUMP_ON_TIMEOUT:-1}"

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
