#!/usr/bin/env bash
# Makes .venv as constraints.txt pins it when it is missing or stale, and does nothing when it is not.
# Environment: VENV (folder, default .venv), PYTHON (interpreter), FLOOR=true (the oldest supported transformers).
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
FLOOR=${FLOOR:-false}
TORCH=2.13.0
LMMS_EVAL=0.7.3
FLOOR_TRANSFORMERS=5.17.0

python=${PYTHON:-}
for candidate in python3.11 python3.12 python3; do
  [ -n "$python" ] || ! command -v "$candidate" >/dev/null || python=$candidate
done
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup: Python 3.11 or newer is needed; name one with PYTHON=..." >&2
  exit 1
fi

kind=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then kind=gpu; fi
stamp=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum; echo "$PWD $kind $FLOOR"; "$python" --version)
if [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/stamp" 2>/dev/null)" = "$stamp" ]; then exit 0; fi

echo "setup: making $VENV for a $kind machine (about two minutes, 2 GB)" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() {
  if ! "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >"$log" 2>&1; then
    cat "$log" >&2
    echo "setup: pip install $* failed; what it said stands above" >&2
    return 1
  fi
}
rm -rf "$VENV"
"$python" -m venv "$VENV"

pins=constraints.txt
if [ "$FLOOR" = true ]; then
  pins="$VENV/floor.txt"
  # what the older transformers itself narrows is left to it
  sed -E "s/^transformers==.*/transformers==$FLOOR_TRANSFORMERS/; /^(huggingface_hub|tokenizers|hf-xet)==/d" \
    constraints.txt >"$pins"
fi

# torch first, so that nothing behind it chooses another. A build for CPUs carries '+cpu' in its version and sorts above
# the plain one, which on Linux brings several GB of CUDA packages.
if [ "$kind" = cpu ]; then
  if ! install "torch==$TORCH+cpu" -c "$pins" 2>/dev/null; then
    echo "setup: no CPU build of torch $TORCH in pip's sources (PIP_EXTRA_INDEX_URL can add one); taking the default build" >&2
    install "torch==$TORCH" -c "$pins"
  fi
else
  install "torch===$TORCH" -c "$pins"
fi
install setuptools -c "$pins"
install --no-build-isolation -e ".[test]" -c "$pins"
install --no-deps "lmms-eval==$LMMS_EVAL" # its dependencies hold a torchvision that breaks a CPU torch
echo "$stamp" >"$VENV/stamp"
