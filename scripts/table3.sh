#!/usr/bin/env bash
# Every run of the PiToMe paper's LLaVA table (eval/recipes/table3.txt); arguments go to each run, dry_run=true prints
# what would run.
set -euo pipefail
scripts=$(dirname "$0")
exec bash "$scripts/run_module.sh" eval.recipe "$scripts/../eval/recipes/table3.txt" "$@"
