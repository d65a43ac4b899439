#!/usr/bin/env bash
# PiToMe and its peers on LLaVA-1.5-7B at 192, 128 and 64 tokens (eval/recipes/field.txt); arguments go to each run,
# dry_run=true prints what would run.
set -euo pipefail
scripts=$(dirname "$0")
exec bash "$scripts/run_module.sh" eval.recipe "$scripts/../eval/recipes/field.txt" "$@"
