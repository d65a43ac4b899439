#!/usr/bin/env bash
# Tests vLLM with the plugin, on the CPU too, against transformers under the same config; arguments go to pytest.
# It has a venv of its own, .venv.vllm, made when it is missing or stale.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_vllm.sh
# conftest.py leaves them out of the quick suite
exec .venv.vllm/bin/python -m pytest --noconftest --show-capture=no tests/test_vllm_offline.py tests/test_vllm_server.py \
  tests/test_vllm_docs.py "$@"
