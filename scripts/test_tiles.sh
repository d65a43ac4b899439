#!/usr/bin/env bash
# Tests models that cut images into tiles, take videos or read several feature layers; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec "${VENV:-.venv}"/bin/python -m pytest -n 2 --dist loadfile tests/test_tile*.py \
  tests/test_{bench,eval,flops,repeats,sweep}_tiles.py tests/test_feature_layer*.py tests/test_kin.py tests/test_video_io.py tests/test_train_next.py "$@"
