#!/usr/bin/env bash
# Makes .venv as constraints.txt pins it when it is missing or stale, and does nothing when it is not.
# Environment: VENV (folder, default .venv), PYTHON (interpreter), FLOOR=true (the oldest supported transformers).
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv} # below the checkout, or an absolute path
FLOOR=${FLOOR:-false}
TORCH=2.13.0
LMMS_EVAL=0.7.3
LLAVA_TORCH=1.2.2.post1
FLOOR_TRANSFORMERS=5.17.0

python=
for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "setup: Python 3.11 or newer is needed; none of ${PYTHON:-python3.11 python3.12 python3.13 python3} is" >&2
  exit 1
fi

kind=cpu
if [ -e /dev/nvidia0 ] || [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; then kind=gpu; fi
pins=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum; echo "$PWD $FLOOR"; "$python" --version)
stamp="$kind $pins"
fresh() { # what was made for GPUs runs without one too
  local made
  made=$(cat "$VENV/stamp" 2>/dev/null) || return 1
  [ -x "$VENV/bin/python" ] && { [ "$made" = "$stamp" ] || [ "$made" = "gpu $pins" ]; }
}
if fresh; then exit 0; fi
if command -v flock >/dev/null; then # two scripts started at once make it once
  exec 9>"$VENV.lock"
  flock 9
  if fresh; then exit 0; fi
fi
if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
  echo "setup: $VENV is there and is no virtual environment; remove it or name another with VENV=..." >&2
  exit 1
fi

echo "setup: making $VENV for a $kind machine (about two minutes, 2 GB)" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
try_install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >"$log" 2>&1; }
install() {
  if ! try_install "$@"; then
    cat "$log" >&2
    echo "setup: pip install $* failed; what it said stands above" >&2
    return 1
  fi
}
rm -rf "$VENV"
"$python" -m venv "$VENV"

constraints=constraints.txt
if [ "$FLOOR" = true ]; then
  constraints="$VENV/floor.txt"
  # what the older transformers itself narrows is left to it
  sed -E "s/^transformers==.*/transformers==$FLOOR_TRANSFORMERS/; /^(huggingface_hub|tokenizers|hf-xet)==/d" \
    constraints.txt >"$constraints"
fi

# torch first, so that nothing behind it chooses another. A build for CPUs carries '+cpu' in its version and sorts above
# the plain one, which on Linux brings several GB of CUDA packages.
if [ "$kind" = gpu ]; then
  install "torch===$TORCH" -c "$constraints"
elif [ "$(uname)" = Linux ] && ! try_install "torch==$TORCH+cpu" -c "$constraints"; then
  if ! grep -q "No matching distribution" "$log"; then
    cat "$log" >&2
    exit 1
  fi
  echo "setup: pip's sources have no CPU build of torch $TORCH (PIP_EXTRA_INDEX_URL can add one that has);" \
    "taking the default build, which may bring CUDA packages" >&2
fi
install "torch==$TORCH" -c "$constraints" # nothing more to do where one of the above is in place
install setuptools -c "$constraints"
install --no-build-isolation -e ".[test]" -c "$constraints"
install --no-deps "lmms-eval==$LMMS_EVAL" # its dependencies hold a torchvision that breaks a CPU torch
install --no-deps "llava-torch==$LLAVA_TORCH" # the original LLaVA, for tests alone; it asks for a torch of 2023
echo "$stamp" >"$VENV/stamp"
