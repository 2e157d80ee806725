#!/bin/bash
# One rank per slot of a DeepSpeed hostfile, by ssh: launch/hostfile.sh HOSTFILE RECIPE [section.key=value ...]
# Needs keys instead of passwords, and the same paths on every host. HOSTFILE: one "HOST slots=N" a line.
set -euo pipefail
hostfile=${1:?usage: hostfile.sh HOSTFILE RECIPE [section.key=value ...]}
recipe=${2:?usage: hostfile.sh HOSTFILE RECIPE [section.key=value ...]}
shift 2
exec "${PYTHON:-python}" -m trainer train "$recipe" launch.launcher=ssh "launch.hostfile='$hostfile'" "$@"
