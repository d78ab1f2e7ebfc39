#!/usr/bin/env bash
# From a clone to a trained and evaluated predictor with a report: installs into .venv, then runs the demo.
#   bash launch/quickstart.sh [key=value ...] [--json]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment demo
exec "$VENV/bin/hopescale" demo "$@"
