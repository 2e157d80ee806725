#!/bin/bash
# One rank per MPI process: launch/mpirun.sh PROCESSES RECIPE [section.key=value ...]
# MPI starts the ranks and tells them rank 0's address; it carries no training data. Hosts: MPIRUN_OPTIONS="--hostfile FILE".
set -euo pipefail
processes=${1:?usage: mpirun.sh PROCESSES RECIPE [section.key=value ...]}
shift
# shellcheck disable=SC2086 # several options
exec mpirun ${MPIRUN_OPTIONS:-} -n "$processes" "${PYTHON:-python}" -m trainer train "$@"
