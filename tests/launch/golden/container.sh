#!/bin/bash
# Trains w1_4b with w1train; written by python -m launch.slurm, which submits it. By hand: sbatch THIS_FILE
#SBATCH --job-name=w1_4b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --account=llm
#SBATCH --qos=high
#SBATCH --time=2-0
#SBATCH --signal=B:USR1@160
#SBATCH --chdir=/home/me/w1train
#SBATCH --output=/scratch/me/runs/w1_4b/logs/slurm_%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --exclusive

export NCCL_DEBUG=INFO
export NOTE='it'"'"'s two words'
export PYTHONPATH=/home/me/w1train"${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
module load slurm
set -uo pipefail
run=/scratch/me/runs/w1_4b
max_failures=3
requeue=yes
chain=no
srun_options=(
  --export=ALL
  --kill-on-bad-exit=0
  --wait=120
  --gpu-bind=none
  --container-image=/images/w1train.sqsh
  '--container-mounts=/home/me/w1train:/home/me/w1train,/scratch/me/runs:/scratch/me/runs,/data:/data:ro'
  --container-workdir=/home/me/w1train
  --container-env=NCCL_DEBUG
)
command=(
  python
  -m
  w1train.pretrain
  recipe=w1_4b
  parallel.tensor=4
  runs_dir=/scratch/me/runs
)
status_command=(
  srun
  --export=ALL
  --nodes=1
  --ntasks=1
  --ntasks-per-node=1
  --container-image=/images/w1train.sqsh
  '--container-mounts=/home/me/w1train:/home/me/w1train,/scratch/me/runs:/scratch/me/runs,/data:/data:ro'
  --container-workdir=/home/me/w1train
  python
  -m
  w1train.status
)

# Environment variables of the ranks. launch/torchrun.sh sources this file, and launch/slurm_script.py copies it into a job's script.
# Your own values take precedence: export them before, or give them to launch.slurm with --env.

# Threads of a rank's CPU operators. If this is not set, each rank uses all cores, for which eight ranks of a node would compete. What a
# rank does on the CPU (packing, logging) gains nothing from more threads. Data loading has its own workers (data.num_workers).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Python's output reaches the log at once, and a crash in native code (SIGSEGV, SIGABRT) writes the Python stack into it.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"

# With one hardware queue, GPUs up to Hopper start kernels in the order of their launch, so that a collective that was launched before a
# matrix product does not wait for it. Megatron's overlap of tensor and context parallelism relies on this order. Blackwell needs the
# default (8).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Memory segments grow instead of being too small for the next shape. Packed batches differ from step to step, and would otherwise fragment
# the memory.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# NCCL logs its version and its errors. INFO adds the topology and the transports, which are the first thing to look at when collectives
# are slow. NCCL's own choices (NCCL_ALGO, NCCL_PROTO, NCCL_NVLS_ENABLE, NCCL_IB_*) stay as they are; docs/cluster.md says when to set
# them. On nodes with several networks, gloo may choose the wrong one: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the right one.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# The flight recorder keeps the last collectives of each rank in memory, with their Python stacks, and writes them to a file when a
# collective times out. `torchfrtrace` compares the files of all ranks, and names the rank that is missing or in another collective.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_FR_DUMP_ON_TIMEOUT="${TORCH_FR_DUMP_ON_TIMEOUT:-1}"

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

