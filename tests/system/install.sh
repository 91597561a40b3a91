#!/usr/bin/env bash
# Installs what the system tests start and pip cannot bring: a Chromium. Where it cannot, those tests skip and say why.
set -euo pipefail
command -v chromium >/dev/null && exit 0
if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >/dev/null
else
  echo "tests/system/install.sh: no chromium, and not root on a Debian system: browser tests will be skipped" >&2
fi
