#!/usr/bin/env bash
# Every run of the PiToMe paper's LLaVA table (eval/recipes/table3.txt); arguments go to each run, dry_run=true prints
# what would run.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/scripts/setup.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 # relative paths stay the caller's
exec "${VENV:-$root/.venv}/bin/python" -m eval.recipe "$root/eval/recipes/table3.txt" "$@"
