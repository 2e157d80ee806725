#!/bin/bash
# One rank per task, inside an allocation (salloc, or your own batch script):
#   salloc --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/srun.sh RECIPE [section.key=value ...]
# No torchrun and no MPI: ranks read SLURM's variables. `trainer submit` writes a batch script that also requeues itself.
set -euo pipefail
: "${SLURM_JOB_ID:?run this inside a SLURM allocation}"
exec srun --kill-on-bad-exit=1 --wait=60 "${PYTHON:-python}" -m trainer train "$@"
