#!/usr/bin/env bash
# Installs what tests of ops/ run, with apt-get and only if something is missing. Starts no service.
#
#   bash tests/integration/install_prometheus.sh
#
# Exit code: 0 when everything is there, 2 when it is missing and cannot be installed from here (not root, no apt-get),
# 1 when apt-get failed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=install_programs.sh
source "$(dirname "${BASH_SOURCE[0]}")/install_programs.sh"

install_programs prometheus:prometheus promtool:prometheus prometheus-alertmanager:prometheus-alertmanager \
  amtool:prometheus-alertmanager setpriv:util-linux unshare:util-linux
