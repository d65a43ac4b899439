#!/usr/bin/env bash
# Sets the project up where needed and runs the test suite; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
"${VENV:-.venv}"/bin/ruff check .
"${VENV:-.venv}"/bin/ruff format --check .
exec "${VENV:-.venv}"/bin/python -m pytest "$@"
