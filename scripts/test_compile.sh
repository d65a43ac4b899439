#!/usr/bin/env bash
# Runs the tests of torch.compile, torch.jit.trace and torch.export; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec "${VENV:-.venv}"/bin/python -m pytest tests/test_compile.py "$@"
