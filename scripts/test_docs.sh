#!/usr/bin/env bash
# Runs the commands and the Python of the how-to pages in docs, as they stand there.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec "${VENV:-.venv}"/bin/python -m pytest tests/test_docs.py "$@"
