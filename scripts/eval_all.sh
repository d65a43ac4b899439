#!/usr/bin/env bash
# The six tasks of the PiToMe paper's LLaVA table, on real weights and data (a GPU and the hub are needed):
#   bash scripts/eval_all.sh model=llava-hf/llava-1.5-7b-hf ratio=0.9
set -euo pipefail
exec bash "$(dirname "$0")/eval_vqav2.sh" \
  tasks=vqav2_val,gqa,vizwiz_vqa_val,scienceqa_img,textvqa_val,mme "$@"
