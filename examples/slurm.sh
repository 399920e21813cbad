#!/bin/bash
# ImageNet on several machines under SLURM, one torchrun on each: sbatch --export=ALL,DATA=/imagenet examples/slurm.sh
# Shortly before its time is over the job saves and stops the run, and requeues itself; the run then resumes.
#SBATCH --job-name=vpl-r50-vitb
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

RECIPE=${RECIPE:-imagenet_vpl_resnet50_vitb_300ep}
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}  # on each machine
export OMP_NUM_THREADS=1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The processes end together by themselves: srun must not kill one that is still saving.
srun --kill-on-bad-exit=0 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$PROCESSES" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m timm_vpl train --config "$RECIPE" --data-dir "$DATA" --experiment "$SLURM_JOB_NAME" --resume auto "$@" &
run=$!

# srun forwards the signal: all processes stop at the same update, and save.
trap 'stopped=yes; kill -USR1 "$run"' USR1
wait "$run"; status=$?
if [ -n "$stopped" ]; then
    wait "$run"  # a trap ends the first wait early
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
