#!/bin/bash
# Trains small with w1train; written by python -m launch.slurm, which submits it. By hand: sbatch THIS_FILE
#SBATCH --job-name=small
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=4
#SBATCH --signal=B:USR1@160
#SBATCH --chdir=/home/me/w1train
#SBATCH --output=/home/me/w1train/runs/small/logs/slurm_%j.log
#SBATCH --open-mode=append
#SBATCH --no-requeue

export SRUN_CPUS_PER_TASK=4
set -uo pipefail
run=/home/me/w1train/runs/small
max_failures=3
requeue=no
chain=no
srun_options=(
  --kill-on-bad-exit=0
  --wait=120
)
command=(
  /home/me/.venv/bin/python
  -m
  w1train.pretrain
  recipe=demo
  name=small
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

