#!/usr/bin/env bash
# Make .venv and install the trainer into it, with the versions that are tested. `launch/install.sh dev` adds the
# development tools. TRAINER_PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:+[$1]}
[ -x .venv/bin/python ] || "${TRAINER_PYTHON:-python3}" -m venv .venv
stamp=.venv/.installed${1:+-$1}
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ launch/constraints.txt -nt "$stamp" ]; then
  echo "installing into .venv (once; a few minutes on a slow network)"
  # torch first: packages built against it must find it
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt torch
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e ".$extra"
  touch "$stamp"
fi
