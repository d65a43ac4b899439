#!/usr/bin/env bash
# Runs the tests that touch transformers with the oldest version that is supported.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=.venv.floor FLOOR=true bash scripts/setup.sh
exec .venv.floor/bin/python -m pytest tests/test_tower.py tests/test_api.py tests/test_loading.py \
  tests/test_training.py tests/test_processor.py tests/test_kernels.py tests/test_bench.py \
  tests/test_decoder*.py tests/test_prefix.py tests/test_places.py tests/test_positions.py tests/test_shrink.py \
  tests/test_original.py tests/test_conversion*.py \
  tests/test_chat.py tests/test_serving*.py tests/test_tracing.py "$@"
