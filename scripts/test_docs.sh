#!/usr/bin/env bash
# Runs the commands and the Python of README.md and docs/*.md; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec "${VENV:-.venv}"/bin/python -m pytest tests/test_docs.py "$@"
