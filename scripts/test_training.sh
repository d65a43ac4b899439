#!/usr/bin/env bash
# Runs the tests that train in several processes, with DeepSpeed, quantized, and killed in between; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
# conftest.py leaves them out of the quick suite
exec "${VENV:-.venv}"/bin/python -m pytest --noconftest tests/test_lora_processes.py "$@"
