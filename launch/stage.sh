#!/bin/bash
# Pack an environment for launch.slurm.stage: launch/stage.sh OUTPUT.tar [ENVIRONMENT]; default: the active one, or .venv.
# Its packages move with it; the base interpreter that bin/python links to must be on the nodes. Install the trainer
# without -e, or its own files are still read from the checkout.
set -euo pipefail
output=${1:?usage: stage.sh OUTPUT.tar [ENVIRONMENT]}
environment=${2:-${VIRTUAL_ENV:-.venv}}
[ -x "$environment/bin/python" ] || { echo "$environment has no bin/python" >&2; exit 2; }
tar -C "$environment" -cf "$output.new" .
mv "$output.new" "$output"
