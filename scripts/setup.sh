#!/usr/bin/env bash
# Creates .venv with the versions of constraints.txt where it is missing or stale, and else does nothing.
# Environment: VENV (folder, default .venv), PYTHON (interpreter).
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv} # below the checkout, or an absolute path
TORCH=2.13.0
LMMS_EVAL=0.7.3
LLAVA_TORCH=1.2.2.post1

candidates=${PYTHON:-python3.11 python3.12 python3.13 python3}
python=
for candidate in $candidates; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "setup: Python 3.11 or newer is needed; none of $candidates is" >&2
  exit 1
fi

kind=cpu
if [ -e /dev/nvidia0 ] || [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; then kind=gpu; fi
pins=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum; echo "$PWD"; "$python" --version)
stamp="$kind $pins"
is_fresh() { # an environment made for GPUs runs without one too
  local made
  made=$(cat "$VENV/stamp" 2>/dev/null) || return 1
  [ -x "$VENV/bin/python" ] && { [ "$made" = "$stamp" ] || [ "$made" = "gpu $pins" ]; }
}
if is_fresh; then exit 0; fi
if command -v flock >/dev/null; then # of two concurrent scripts, one creates it
  exec 9>"$VENV.lock"
  flock 9
  if is_fresh; then exit 0; fi
fi
if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
  echo "setup: $VENV exists and is no virtual environment; remove it or name another with VENV=..." >&2
  exit 1
fi

echo "setup: creating $VENV for a $kind machine (about two minutes, 2 GB)" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
try_install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >"$log" 2>&1; }
install() {
  if ! try_install "$@"; then
    cat "$log" >&2
    echo "setup: pip install $* failed; its output is above" >&2
    return 1
  fi
}
rm -rf "$VENV"
"$python" -m venv "$VENV"

# torch first, so that no later package chooses another. A build for CPUs has '+cpu' in its version and sorts above the
# default one, which on Linux brings several GB of CUDA packages.
if [ "$kind" = gpu ]; then
  install "torch===$TORCH" -c constraints.txt
elif [ "$(uname)" = Linux ] && ! try_install "torch==$TORCH+cpu" -c constraints.txt; then
  if ! grep -q "No matching distribution" "$log"; then
    cat "$log" >&2
    exit 1
  fi
  echo "setup: pip's sources have no CPU build of torch $TORCH (PIP_EXTRA_INDEX_URL can add one that has);" \
    "taking the default build, which may bring CUDA packages" >&2
fi
install "torch==$TORCH" -c constraints.txt # does nothing where one of the above succeeded
install setuptools -c constraints.txt
install --no-build-isolation -e ".[test]" -c constraints.txt
install --no-deps "lmms-eval==$LMMS_EVAL" # its dependencies include a torchvision that does not load beside a CPU torch
install --no-deps "llava-torch==$LLAVA_TORCH" # the original LLaVA, for tests; it requires a torch of 2023
echo "$stamp" >"$VENV/stamp"
