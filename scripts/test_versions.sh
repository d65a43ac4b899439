#!/usr/bin/env bash
# Tests the oldest supported transformers and the newest released one; arguments go to pytest.
# Each has a small environment, .venv.transformers-VERSION, on top of the main one, made when it is missing or stale.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
main=${VENV:-.venv}
packages=$("$main/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

status=0
for version in 5.17.0 5.24.0; do
  venv=.venv.transformers-$version
  stamp=$(cat "$main/stamp" scripts/test_versions.sh | cksum)
  if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$venv"
    "$main/bin/python" -m venv "$venv"
    echo "$packages" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
    grep -vE "^(transformers|tokenizers|huggingface_hub|hf-xet)==" constraints.txt >"$venv/pins.txt"
    # pip also lists the unmet dependencies of the packages that setup.sh installs without theirs
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check -c "$venv/pins.txt" "transformers==$version" \
      >"$venv/pip.log" 2>&1 || { cat "$venv/pip.log" >&2 && exit 1; }
    echo "$stamp" >"$venv/stamp"
  fi
  # the original package's own `generate` does not run with 5.24, which hands it a `cache` that it does not know
  skip=(); if [ "$version" = 5.24.0 ]; then skip=(--deselect tests/test_conversion.py::test_logits_answers_and_beams_equal_those_of_the_original); fi
  echo "transformers $("$venv/bin/python" -c 'import transformers; print(transformers.__version__)')"
  "$venv/bin/python" -m pytest -n 2 --dist loadfile tests/test_tower.py tests/test_api.py tests/test_processor.py \
    tests/test_prefix.py tests/test_decoder*.py tests/test_positions.py tests/test_shrink.py tests/test_loading.py \
    tests/test_flash_attention.py tests/test_conversion.py tests/test_serving.py tests/test_feature_layers.py \
    tests/test_feature_layer_calls.py tests/test_kin.py "${skip[@]}" "$@" || status=1
done
exit "$status"
