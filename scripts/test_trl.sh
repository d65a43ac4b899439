#!/usr/bin/env bash
# Runs the tests of TRL's trainers with merging models; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec "${VENV:-.venv}"/bin/python -m pytest tests/test_trl.py "$@"
