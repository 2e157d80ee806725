#!/usr/bin/env bash
# Long matrices, by seed: tests/sweep.sh [SEED]. Not part of CI; report the seed with the result.
#  - ranks killed at random moments, many times in one run: the losses equal an undisturbed run's
#  - the same, restarted at other world sizes: every global batch equals the undisturbed run's
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh dev
seed=${1:-$RANDOM}
echo "seed $seed"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
export PYTHONPATH=tests
.venv/bin/python tests/distributed/kill_sweep.py --seed "$seed"
.venv/bin/python tests/distributed/kill_data_sweep.py --seed "$seed"
