#!/usr/bin/env bash
# Runs the tests of training in several processes, with DeepSpeed, quantized and killed; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
# conftest.py leaves them out of the main suite
exec "${VENV:-.venv}"/bin/python -m pytest --noconftest tests/test_lora_processes.py "$@"
