#!/usr/bin/env bash
# Runs the tests of the Triton kernels, without a GPU in Triton's interpreter; arguments go to pytest.
# Their venv, .venv.triton, is made when it is missing or stale. It is separate because beside a CPU torch, triton
# changes what other libraries (bitsandbytes, torch's inductor) detect.
# Environment: PYTHON (interpreter).
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv.triton
TRITON=3.7.1 # the version that torch 2.13.0 is built against; it has wheels for Linux only
TORCH=$(sed -n 's/^torch==//p' constraints.txt)

kind=cpu
if [ -e /dev/nvidia0 ] || [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; then kind=gpu; fi
stamp="$kind $(cat constraints.txt scripts/test_triton.sh | cksum) $PWD"
fresh() { [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/stamp" 2>/dev/null)" = "$stamp" ]; }

make_venv() {
  local python output
  for python in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
    python=
  done
  if [ -z "$python" ]; then
    echo "test_triton: Python 3.11 or newer is needed; none of ${PYTHON:-python3.11 python3.12 python3.13 python3} is" >&2
    return 1
  fi
  echo "test_triton: making $VENV for a $kind machine (under a minute, 2 GB)" >&2
  rm -rf "$VENV"
  "$python" -m venv "$VENV"
  local install=("$VENV/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt)
  # torch as scripts/setup.sh chooses it: without a GPU the CPU build, where pip's index has one
  if [ "$kind" = gpu ]; then
    "${install[@]}" "torch===$TORCH"
  elif ! output=$("${install[@]}" "torch==$TORCH+cpu" 2>&1); then
    if [[ $output != *"No matching distribution"* ]]; then
      echo "$output" >&2
      return 1
    fi
    echo "test_triton: no CPU build of torch $TORCH; taking the default build, which may bring CUDA packages" >&2
    "${install[@]}" "torch==$TORCH"
  fi
  "${install[@]}" "triton==$TRITON" pytest numpy setuptools
  "${install[@]}" --no-deps --no-build-isolation -e .
  echo "$stamp" >"$VENV/stamp"
}

if ! fresh; then
  if command -v flock >/dev/null; then # scripts started at once make one venv
    exec 9>"$VENV.lock"
    flock 9
  fi
  fresh || make_venv
  exec 9>&-
fi
if [ "$kind" = cpu ]; then export TRITON_INTERPRET=1; fi
# conftest.py needs transformers, which this venv lacks
exec "$VENV/bin/python" -m pytest --noconftest tests/test_kernels_triton.py "$@"
