#!/usr/bin/env bash
# Train with torchrun on this machine, or on this machine as one of several. torchrun starts a rank for each GPU, and starts all ranks
# again if one of them has died, but not after a mistake of the user (launch/elastic.py).
#
#   launch/torchrun.sh recipe=w1_4b                                          one node
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=gpu1 launch/torchrun.sh recipe=w1_4b    the same on every node, with its NODE_RANK
#   srun --ntasks-per-node=1 launch/torchrun.sh recipe=w1_4b                 Slurm says which node this is
#   launch/torchrun.sh --nsys recipe=w1_4b profiling.tool=nsys "profiling.steps=[20,24]"      rank 0 under Nsight Systems
#
# Arguments are those of w1train.pretrain, and so is the exit status: 0 finished, 75 stopped by a signal after saving (the same command
# resumes the run), 2 a mistake of the user, 130 after Ctrl-C (which saves too), 1 failed more than MAX_RESTARTS times. Relative paths begin
# at the caller's directory.
#
# Environment variables, in addition to those of launch/settings.sh:
#   NPROC         ranks on this node                              (default: its GPUs, or 1)
#   NNODES        nodes                                           (default: 1, or Slurm's)
#   NODE_RANK     this node's number; node 0 hosts the rendezvous (default: 0, or Slurm's)
#   MASTER_ADDR   node 0, as all nodes reach it                   (default: localhost with one node, or Slurm's first)
#   MASTER_PORT   a free port there                               (default: from the number of Slurm's job, or from the run directory)
#   MAX_RESTARTS  how often all ranks are started again           (default: 3)
#   NSYS          ranks under nsys, as with --nsys=; 1 is rank 0  (default: no rank)
#   VENV          the environment of launch/bootstrap.sh          (default: .venv beside pyproject.toml)
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/settings.sh
source "$repository/launch/settings.sh"
VENV="${VENV:-$repository/.venv}"
python="$VENV/bin/python"
# The ranks run the code of this repository. Without PYTHONSAFEPATH, a module of the same name in the caller's directory would come first.
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1

fail() {
  printf 'launch/torchrun.sh: %s\n' "$*" >&2
  exit 2
}

if [[ ! -x "$python" ]]; then fail "there is no $python: make the environment with launch/bootstrap.sh, or name yours with VENV="; fi
nsys="${NSYS:-}"
if [[ "$nsys" == 1 ]]; then nsys=0; fi
case "${1:-}" in
--nsys) nsys=0 && shift ;;
--nsys=*) nsys="${1#--nsys=}" && shift ;;
esac

# Under srun with one task on each node, Slurm says how many nodes there are, and which is the first.
if [[ -n "${SLURM_STEP_NUM_NODES:-}" && -z "${NNODES:-}" ]]; then
  if [[ "$SLURM_STEP_NUM_TASKS" != "$SLURM_STEP_NUM_NODES" ]]; then
    fail "srun started $SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES nodes, and torchrun needs one for each node: --ntasks-per-node=1"
  fi
  NNODES="$SLURM_STEP_NUM_NODES"
  NODE_RANK="$SLURM_NODEID"
  MASTER_ADDR="${MASTER_ADDR:-$("$python" -c 'import sys; from w1train.runtime.cluster import first_host; print(first_host(sys.argv[1]))' \
    "$SLURM_STEP_NODELIST")}"
  if [[ "$NNODES" == 1 ]]; then MASTER_ADDR=localhost; fi
fi
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
NPROC="${NPROC:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
if [[ "$NNODES" != 1 && -z "${MASTER_ADDR:-}" ]]; then fail "NNODES=$NNODES needs MASTER_ADDR, the name or address of node 0"; fi

# A mistake in the recipe is reported once, here, and not by every rank of every node. On several nodes, a node that lacks a file would leave
# the others waiting if it ended here: there, the ranks look for their files after they have met, and all end together.
if [[ "$NNODES" == 1 ]]; then here="$NPROC"; else here=""; fi
if [[ -n "$nsys" && ! "$nsys" =~ ^(all|[0-9]+(,[0-9]+)*)$ ]]; then fail "--nsys=$nsys: ranks separated by commas, or all"; fi
answer="$("$python" -m launch.check --ranks $((NNODES * NPROC)) ${here:+"--ranks-here=$here"} ${nsys:+"--nsys=$nsys"} -- "$@")"
{ read -r run && read -r stop_timeout; } <<<"$answer"

if [[ "$NNODES" == 1 ]]; then
  # torchrun chooses a free port, so that two runs can share the machine.
  rendezvous=(--standalone)
else
  is_host="$([[ "$NODE_RANK" == 0 ]] && echo true || echo false)"
  MASTER_PORT="$("$python" -m launch.rendezvous_port "$run" --host "$is_host")"
  # With c10d, and not with static, the agents of all nodes notice that a rank has died on one node, and start their ranks again. is_host
  # says which node hosts the rendezvous, because a node's name for itself may differ from the name that others have for it.
  rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT"
    --rdzv-id "${SLURM_JOB_ID:-${run##*/}}_$MASTER_PORT" --rdzv-conf "is_host=$is_host,join_timeout=1800")
  printf 'node %s of %s; the nodes meet at %s:%s\n' "$NODE_RANK" "$NNODES" "$MASTER_ADDR" "$MASTER_PORT"
fi

logs="$run/logs/torchrun_$(date '+%Y%m%d_%H%M%S')_node_$NODE_RANK"
mkdir -p "$logs"
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$logs/nccl_trace_rank_}"
command=(-m w1train.pretrain)
if [[ -n "$nsys" ]]; then command=(-m launch.nsys --ranks "$nsys" --output "$run/nsys" -- "${command[@]}"); fi

# All output is written to files (by attempt, rank, stdout and stderr). The output of the node's first rank goes to the console too: on one
# node this is rank 0, and on the others a rank that writes only when something is wrong (c10d numbers nodes by their sorted names). Signals
# are passed on to the ranks, which have health.stop_timeout to save. By default, torchrun would not handle SIGUSR1, and would kill the
# ranks after 30 s (before torch 2.12 it always does).
TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$(printf '%.0f' "$stop_timeout")"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT
before="$(cat "$run/status.json" 2>/dev/null || true)"
printf '%s ranks, %s on this node; each rank writes to %s\n' $((NNODES * NPROC)) "$NPROC" "$logs"
(
  # Processes that bash starts in the background ignore Ctrl-C until they have a handler of their own.
  trap - INT
  exec "$python" -m launch.elastic "${rendezvous[@]}" --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-3}" \
    --log-dir "$logs" --redirects 3 --tee 0:3 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    "${command[@]}" "$@"
) &
torchrun=$!
trap 'kill -TERM "$torchrun" 2>/dev/null || true' TERM
trap 'kill -USR1 "$torchrun" 2>/dev/null || true' USR1
# Ctrl-C reaches all processes in the foreground: this shell, which waits until the ranks have ended, and torchrun, which passes it on to the
# ranks, because they are in sessions of their own.
interrupted=no
trap 'interrupted=yes' INT
while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun" || true; done
status=0
wait "$torchrun" || status=$?
# A program that starts a run again after 75 must not do this after Ctrl-C.
if [[ "$interrupted" == yes ]]; then exit 130; fi
if [[ "$status" == 0 || "$status" == 2 || "$status" == 75 || "$status" == 130 ]]; then exit "$status"; fi
# After a signal, torchrun ends with 1 whatever its ranks end with. The run's status.json says whether it was stopped or has failed. A status.json of an
# earlier start does not count: ranks that end before they write one would be started again for ever.
status=1
after="$(cat "$run/status.json" 2>/dev/null || true)"
if [[ -n "$after" && "$after" != "$before" ]]; then
  status=0
  "$python" -m w1train.status "$run" || status=$?
fi
if [[ "$status" == 75 ]]; then exit 75; fi
if [[ "$status" == 2 ]]; then exit 2; fi
exit 1
