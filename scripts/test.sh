#!/usr/bin/env bash
# Sets the project up where needed and runs linters and the test suite, in two processes; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
bin=${VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/lint-imports" --no-cache --no-logo
exec "$bin/python" -m pytest -n 2 --dist loadfile "$@"
