#!/usr/bin/env bash
# Command 1: install into .venv, then train, evaluate, export and sample a small model. Run again to continue.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh
exec .venv/bin/trainer quickstart "$@"
