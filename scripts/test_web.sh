#!/usr/bin/env bash
# Tests the web page in a real Chromium: one that is installed ($CHROMIUM names another), or else Playwright's own.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
python=${VENV:-.venv}/bin/python
browser=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}
if [ -z "$browser" ] && ! "$python" -m playwright install --with-deps chromium; then
  echo "test_web: Playwright could not fetch its browser; trying the system's packages" >&2
  apt-get update -qq && apt-get install -y -qq chromium
  browser=$(command -v chromium)
fi
CHROMIUM=$browser exec "$python" -m pytest tests/test_web_page.py "$@"
