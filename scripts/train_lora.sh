#!/usr/bin/env bash
# Fine-tunes a merging LLaVA: bash scripts/train_lora.sh ratio=0.8 model=... data=... (help lists the keys).
set -euo pipefail
exec bash "$(dirname "$0")/run_module.sh" train.run "$@"
