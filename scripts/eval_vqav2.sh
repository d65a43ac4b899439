#!/usr/bin/env bash
# Evaluates a merged LLaVA on VQAv2 beside the unmerged one: bash scripts/eval_vqav2.sh ratio=0.9 (help lists the keys).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/scripts/setup.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 # relative paths stay the caller's
exec "${VENV:-$root/.venv}/bin/python" -m eval.run "$@"
