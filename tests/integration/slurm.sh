#!/usr/bin/env bash
# Installs a Slurm if there is none, and runs the tests that need one. Needs root, for namespaces and networks of nodes.
#
#   bash tests/integration/slurm.sh [PYTEST ARGUMENTS]
#
#   TEST_PYTHON   the Python to test with (default: that of .venv, brought up to date as launch/test.sh does)
#
# Exit code: that of pytest; 2 if something is missing that cannot be installed from here, or this is not root.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR/../../launch source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../launch/environment.sh"
cd "$REPO_ROOT"

start=$SECONDS
if [ "$(id -u)" != 0 ]; then
  echo "slurm.sh: nodes with namespaces and networks of their own need root: run it as root" >&2
  exit 2
fi
bash tests/integration/install_slurm.sh
[ -n "${TEST_PYTHON:-}" ] || prepare_environment demo dev
installed=$SECONDS

code=0
HOPESCALE_REQUIRE=slurm "${TEST_PYTHON:-$VENV/bin/python}" -m pytest -n 2 --dist worksteal tests/integration/test_slurm*.py "$@" || code=$?
printf 'slurm.sh: %d s to install, %d s to test\n' $((installed - start)) $((SECONDS - installed)) >&2
exit "$code"
