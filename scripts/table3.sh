#!/usr/bin/env bash
# Every run of the PiToMe paper's LLaVA table (eval/recipes/table3.txt); arguments go to each run, dry_run=true says
# what would run.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec "${VENV:-.venv}/bin/python" eval/recipe.py eval/recipes/table3.txt "$@"
