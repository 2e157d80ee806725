#!/bin/bash
# torchrun on this machine: launch/torchrun.sh PROCESSES RECIPE [section.key=value ...]
# On several nodes start it on each, with TORCHRUN_OPTIONS="--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400".
set -euo pipefail
processes=${1:?usage: torchrun.sh PROCESSES RECIPE [section.key=value ...]}
shift
# By default the agent dies of USR1 and USR2; the ranks answer them by saving.
export TORCHELASTIC_SIGNALS_TO_HANDLE=${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}
# shellcheck disable=SC2086 # several options
exec torchrun ${TORCHRUN_OPTIONS:---standalone} --nproc-per-node="$processes" -m trainer train "$@"
