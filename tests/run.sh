#!/usr/bin/env bash
# Command 2: every check and test. `tests/run.sh fast` takes the quick ones only (under two minutes once installed).
# Further arguments go to pytest: tests/run.sh fast -k order
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh dev
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
bin=.venv/bin
$bin/ruff check --quiet .
$bin/ruff format --quiet --check .
$bin/lint-imports --no-cache >/dev/null || $bin/lint-imports --no-cache
if [ "${1:-}" = fast ]; then
  shift
  exec $bin/python -m pytest -q -m fast "$@"
fi
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $bin/pyright --pythonpath $bin/python
# CPU time is measured while nothing else runs.
starts=tests/unit/test_import_time.py
[ $# -gt 0 ] || $bin/python -m pytest -q $starts
# Two files at a time: tests wait on ranks more than they compute. In the order of collection, the long files first.
suite="$bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15"
[ $# -eq 0 ] || exec $suite "$@"
# The tests on a SLURM cluster wait for limits, lost nodes and queues most of the time: they run beside the others,
# one at a time: jobs with a time limit of a minute must get somewhere.
log=$(mktemp)
trap 'rm -f "$log"; kill $(jobs -p) 2>/dev/null || true' EXIT
$bin/python -m pytest -q --durations=15 -m slurm >"$log" 2>&1 &
slurm=$! code=0
$suite --ignore=$starts -m "not slurm and not sweep" || code=$?
wait "$slurm" || code=$?
cat "$log"
exit "$code"
