#!/usr/bin/env bash
# Evaluates a merged LLaVA on VQAv2 beside the unmerged one: bash scripts/eval_vqav2.sh ratio=0.9 (help lists the keys).
set -euo pipefail
exec bash "$(dirname "$0")/run_module.sh" eval.run "$@"
