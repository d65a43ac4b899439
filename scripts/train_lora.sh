#!/usr/bin/env bash
# Fine-tunes a LLaVA while its tokens merge: bash scripts/train_lora.sh ratio=0.8 model=... data=... (help lists the keys).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/scripts/setup.sh"
exec "${VENV:-$root/.venv}/bin/python" "$root/train/run.py" "$@"
