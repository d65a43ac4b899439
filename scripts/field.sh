#!/usr/bin/env bash
# PiToMe and its peers on LLaVA-1.5-7B at 192, 128 and 64 tokens (eval/recipes/field.txt); arguments go to each run,
# dry_run=true prints what would run.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/scripts/setup.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 # relative paths stay the caller's
exec "${VENV:-$root/.venv}/bin/python" -m eval.recipe "$root/eval/recipes/field.txt" "$@"
