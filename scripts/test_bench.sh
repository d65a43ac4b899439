#!/usr/bin/env bash
# Tests the bench and sweeps of evaluations, which start processes of their own; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec "${VENV:-.venv}"/bin/python -m pytest tests/test_bench.py tests/test_sweep.py "$@"
