#!/usr/bin/env bash
# PiToMe and its peers on LLaVA-NeXT-7B at 640, 320 and 160 tokens (eval/recipes/next.txt); arguments go to each run,
# dry_run=true prints what would run.
set -euo pipefail
scripts=$(dirname "$0")
exec bash "$scripts/run_module.sh" eval.recipe "$scripts/../eval/recipes/next.txt" "$@"
