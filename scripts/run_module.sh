#!/usr/bin/env bash
# Runs a Python module of this checkout from the caller's folder: bash scripts/run_module.sh eval.run ratio=0.9.
# Sets the project up where needed. Environment: VENV as in setup.sh.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/scripts/setup.sh"
venv=$(cd "$root" && cd "${VENV:-.venv}" && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 # a train.py in the caller's folder stays out
exec "$venv/bin/python" -m "$@"
