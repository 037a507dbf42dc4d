#!/bin/bash
# A training on two nodes with four GPUs each:  sbatch slurm.sh [OPTIONS of vultus train]
# Three minutes before its time ends, every process writes a checkpoint and ends; the job is queued again and goes on
# from there. DATA must have the same path on all nodes; process 0 reads and writes OUT.
#SBATCH --job-name=vultus
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc_per_node="${PROCESSES:-4}" \
    --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$first_node:29500" \
    -m vultus train --preset vultus-base --data "${DATA:-data/celeba}" --out "${OUT:-runs/vultus-base}" \
    --optim.batch 256 "$@" &
training=$!

again=
trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
status=0
wait "$training" || status=$?
if [ -n "$again" ]; then
    wait "$training" || true
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
