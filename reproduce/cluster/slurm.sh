#!/bin/bash
# One training run on NODES x GPUS GPUs under SLURM: sbatch reproduce/cluster/slurm.sh
# One task per GPU and no launcher between, so that SLURM's signals reach every training process.
#SBATCH --job-name=repae
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}  # of this job alone: others may share a node
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
# What --compile has compiled, where the next job finds it: a disk that all machines see.
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$PWD/exps/.compiled}"

# The command of one GPU, with --resume latest: a first start, a requeued job and one after a crash are the same line.
# When one has ended, in whatever way, the others have two minutes to end as well: they might wait for it for hours.
# A task that was killed or crashed (134, 135, 137, 139) is no mistake of the command: all start again, three times at most.
for _ in 1 2 3 4; do
  # shellcheck disable=SC2016  # expanded by each task
  srun --kill-on-bad-exit=0 --wait=120 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python -m repae_lite train-repae --preset repae-sdvae --data-dir data --output-dir exps --resume latest'
  code=$?
  case "$code" in 134 | 135 | 137 | 139) ;; *) break ;; esac
done

# 143: stopped by SLURM's SIGTERM, five minutes before the end, with a checkpoint of the last step.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
