#!/usr/bin/env bash
# Long matrices, by seed: tests/sweep.sh [SEED]. Not part of CI; report the seed with the result.
#  - one run of ZeRO-2 and one in pipeline stages, killed 60 times each in every step of saving and at random moments: all
#    that was committed loads, losses, weights and moments equal an undisturbed run's; 5 minutes
#  - the same, restarted at other world sizes: every global batch equals the undisturbed run's
#  - one of four ranks broken in 17 ways at random places: the summary names rank, host, phase and kind; 12 minutes
#  - every layout, dtype and way to save, killed or stopped and resumed: the same bits as an undisturbed run's
#  - tests that are marked "sweep": offload to NVMe, layouts and dtypes in turn, whether upstream still has what is worked
#    around, benchmarks of the data; 10 minutes
#  - every legal layout loads one logical state and writes the same; pairs of layouts take over from each other
#  - every causal-LM family in two pipeline stages, and five families in every layout, against plain transformers:
#    25 minutes on two cores
#  - pretrained SmolLM2-135M in two stages: evaluation, fine-tuning, memory at load
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh dev
seed=${1:-$RANDOM}
echo "seed $seed"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
export PYTHONPATH=tests
.venv/bin/python tests/distributed/kill_sweep.py --seed "$seed"
.venv/bin/python tests/distributed/kill_data_sweep.py --seed "$seed"
.venv/bin/python tests/distributed/fault_sweep.py --seed "$seed"
.venv/bin/python tests/distributed/resume_matrix.py
.venv/bin/python tests/distributed/reshape_sweep.py --seed "$seed"
# Offload to NVMe reads and writes by libaio; the operation is compiled before ranks with time limits ask for it.
if ! .venv/bin/python -c "from deepspeed.ops.op_builder import AsyncIOBuilder as b; exit(not b().is_compatible())"; then
  apt-get install -y --no-install-recommends libaio-dev
fi
.venv/bin/python -c "from deepspeed.ops.op_builder import AsyncIOBuilder as b; b().load(verbose=False)"
.venv/bin/python -m pytest -q -m sweep
.venv/bin/python tools/compatibility.py --layouts --seed "$seed"
.venv/bin/pip install -q gguf==0.19.0
.venv/bin/python tests/distributed/real_weights.py
