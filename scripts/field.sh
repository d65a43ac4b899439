#!/usr/bin/env bash
# PiToMe and its peers on LLaVA-1.5-7B at 192, 128 and 64 tokens (eval/recipes/field.txt); arguments go to each run,
# dry_run=true says what would run.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec "${VENV:-.venv}/bin/python" eval/recipe.py eval/recipes/field.txt "$@"
