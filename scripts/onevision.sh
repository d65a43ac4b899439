#!/usr/bin/env bash
# PiToMe and its peers on LLaVA-OneVision-7B on images and videos (eval/recipes/onevision.txt); arguments go to each run,
# dry_run=true prints what would run.
set -euo pipefail
scripts=$(dirname "$0")
exec bash "$scripts/run_module.sh" eval.recipe "$scripts/../eval/recipes/onevision.txt" "$@"
