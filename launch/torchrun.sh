#!/usr/bin/env bash
# Trains on several ranks of this machine and exits with the code of RUN/status.json.
#   bash launch/torchrun.sh NUM_RANKS key=value ...
#
# Exit codes: 0 done, 2 a mistake in the configuration or the data, 75 stopped early with a checkpoint (start again with the
# same run.dir), 71 no valid checkpoint, 72 diverged, 1 crashed. torchrun itself turns every code of a rank into 1.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case ${1:-} in
'' | *[!0-9]* | 0)
  echo "usage: launch/torchrun.sh NUM_RANKS key=value ..." >&2
  exit 2
  ;;
esac
num_ranks=$1
shift

prepare_environment prometheus tensorboard

# Checks everything in one process, so that a mistake is told once and before any rank starts; prints the run folder, and
# the one whose status to read, which of a dry run lies beside it.
check_configuration() {
  "$VENV/bin/python" - "$num_ranks" "$@" <<'PYTHON'
import sys
from pathlib import Path
from hopescale.config.compose import load_config
from hopescale.dry_run import beside
from hopescale.errors import UserError, describe
from hopescale.parallel.process_group import Launch
from hopescale.preflight import preflight
from hopescale.run_folder import make_run_folder
num_ranks = int(sys.argv[1])
launch = Launch(world_size=num_ranks, local_world_size=num_ranks)
try:
    config = load_config(sys.argv[2:])
    preflight(config, launch)
except UserError as error:
    print(describe(error), file=sys.stderr)
    sys.exit(error.exit_code)
given = config.run.dir
folder = Path(given) if config.run.dry_run and given is not None else make_run_folder(config)
if config.run.dry_run and given is None:
    folder.rmdir()
print(folder)
print(beside(folder) if config.run.dry_run else folder)
PYTHON
}

# status_field RUN NAME: nothing where there is no status yet.
status_field() {
  "$VENV/bin/python" - "$1/status.json" "$2" <<'PYTHON'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
print(json.loads(path.read_text()).get(sys.argv[2], "") if path.is_file() else "")
PYTHON
}

folders=$(check_configuration "$@")
run=$(head -n 1 <<<"$folders") speaking=$(tail -n 1 <<<"$folders")
case " $*" in
*' run.dir='*) ;;
*) set -- "$@" "run.dir=$run" ;;
esac
before=$(status_field "$speaking" incarnation)

cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > num_ranks ? cores / num_ranks : 1))}
# Ctrl-C reaches torchrun itself, which then gives ranks so many seconds to save; 30 without this.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
# Port 0 takes a free one. No restarts inside the job: ranks of a second attempt would find addresses of the first.
"$VENV/bin/python" -m torch.distributed.run --nnodes 1 --nproc-per-node "$num_ranks" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 -m hopescale.train "$@" &
launcher=$!
# Rank 0 looks for this file once a second; a second signal is for whoever does not want to wait.
# shellcheck disable=SC2329 # a trap calls it
stop() {
  if [ -e "$run/stop" ]; then
    kill -TERM "$launcher" 2>/dev/null || true
  else
    touch "$run/stop"
    echo "told to stop: asking for a checkpoint" >&2
  fi
}
trap stop INT TERM
# A trapped signal ends `wait` early, so it is asked until the launcher is gone.
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done

# A dry run that does well leaves nothing.
if [ "$speaking" != "$run" ] && wait "$launcher"; then exit 0; fi
state=$(status_field "$speaking" state) code=$(status_field "$speaking" code)
if [ "$(status_field "$speaking" incarnation)" = "$before" ] || [ -z "$state" ] || [ "$state" = running ]; then
  echo "crashed: $speaking/status.json is missing, old, or still says running" >&2
  exit 1
fi
echo "$state: $speaking" >&2
exit "$code"
