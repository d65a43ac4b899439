#!/usr/bin/env bash
# Sets the project up where needed and runs the test suite; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/ruff check . && .venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
