#!/usr/bin/env bash
# Tests vLLM with the plugin, on CPUs too, against transformers with the same config; arguments go to pytest.
# It has an environment of its own, .venv.vllm, made when it is missing or stale.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_vllm.sh
# conftest.py needs packages that .venv.vllm does not have, and leaves these files out of the main suite
exec .venv.vllm/bin/python -m pytest --noconftest --show-capture=no tests/test_vllm_offline.py \
  tests/test_vllm_tiles.py tests/test_vllm_server.py "$@"
