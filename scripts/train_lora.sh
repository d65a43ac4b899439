#!/usr/bin/env bash
# Fine-tunes a merging LLaVA: bash scripts/train_lora.sh ratio=0.8 model=... data=... (help lists the keys).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/scripts/setup.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 # a train.py in the user's folder stays out
exec "${VENV:-$root/.venv}/bin/python" -m train.run "$@"
