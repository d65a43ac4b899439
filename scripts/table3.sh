#!/usr/bin/env bash
# Every run of the PiToMe paper's LLaVA table (eval/recipes/table3.txt), one after the other; arguments go to each run.
set -euo pipefail
cd "$(dirname "$0")/.."
grep -v '^#' eval/recipes/table3.txt | while read -r line; do
  # shellcheck disable=SC2086  # a line is several words
  bash scripts/eval_all.sh $line "$@" </dev/null
done
