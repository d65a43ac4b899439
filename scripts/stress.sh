#!/usr/bin/env bash
# Random work in threads on several merging models, for SECONDS (default 600), from a SEED (default 0):
#   bash scripts/stress.sh [SECONDS [SEED]]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS=1
exec "${VENV:-.venv}/bin/python" tests/stress.py "${@:-600}"
