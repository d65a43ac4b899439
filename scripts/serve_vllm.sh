#!/usr/bin/env bash
# Serves a merging LLaVA with vLLM, in its own environment: bash scripts/serve_vllm.sh ratio=0.9 model=embedded (`help`
# lists the keys).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/scripts/setup_vllm.sh"
exec "$root/.venv.vllm/bin/python" -m llava_pitome.integrations.vllm.serve_command "$@"
