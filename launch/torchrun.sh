#!/usr/bin/env bash
# Trains on several ranks of this machine, or of several machines, and exits with the code of RUN/status.json.
#
#   bash launch/torchrun.sh NUM_RANKS [--node I/N --head ADDRESS:PORT] key=value ...
#
#   NUM_RANKS             ranks on each machine
#   --node I/N            this is machine I of N, counted from 0; the same command runs on the others, with another I
#   --head ADDRESS:PORT   of machine 0 as the others reach it, and a free port there
#
# Several machines need the same run.dir, on a file system that all of them share; a repository that they share must have the
# same path on each. Without Slurm nobody starts them again. Rank 0, which prints, may be on any of them.
#
# Exit codes: 0 done, 2 a mistake in the configuration or the data, 75 stopped early with a checkpoint (start again with the
# same run.dir), 71 no valid checkpoint, 72 diverged, 1 crashed, or machines that do not fit together.
# torchrun itself turns every code of a rank into 1.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

refuse() {
  printf 'launch/torchrun.sh: %s\n' "$*" >&2
  exit 2
}
case ${1:-} in --help | -h)
  sed -n '2,/^# same run.dir/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
  ;;
esac
usage='usage: launch/torchrun.sh NUM_RANKS [--node I/N --head ADDRESS:PORT] key=value ...'
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || refuse "NUM_RANKS=${1:-}: must be a whole number above 0. $usage"
num_ranks=$1 node=0 nodes=1 head=
shift
while [[ ${1:-} == --* ]]; do
  [ $# -gt 1 ] || refuse "$1 needs a value. $usage"
  case $1 in
  --node)
    [[ $2 =~ ^(0|[1-9][0-9]*)/([1-9][0-9]*)$ ]] && [ "${BASH_REMATCH[1]}" -lt "${BASH_REMATCH[2]}" ] ||
      refuse "--node $2: must be I/N, of N machines the one numbered I from 0 to N-1, for example 0/2"
    node=${BASH_REMATCH[1]} nodes=${BASH_REMATCH[2]}
    [ "$nodes" != 1 ] || refuse "--node $2: one machine meets nobody: leave it away"
    ;;
  --head)
    [[ $2 =~ ^(.+):([1-9][0-9]{0,4})$ ]] && [ "${BASH_REMATCH[2]}" -lt 65536 ] ||
      refuse "--head $2: must be ADDRESS:PORT with a port from 1 to 65535, for example 10.0.0.5:29400"
    head=$2 host=${BASH_REMATCH[1]}
    host=${host#\[} host=${host%\]}
    ;;
  *) refuse "$1: is no option. $usage" ;;
  esac
  shift 2
done

# A name that leads to loopback would let every machine wait for the others at its own door. That of machine 0 may on itself.
is_loopback() {
  local addresses
  addresses=$(getent ahosts "$1" 2>/dev/null | cut -d ' ' -f 1 || true)
  ! grep -qvE '^(127\.|::1$|localhost$)' <<<"${addresses:-$1}"
}
if [ "$nodes" = 1 ]; then
  [ -z "$head" ] || refuse "--head $head: --node I/N is missing: which machine of how many this is"
else
  [ -n "$head" ] || refuse "--head is missing: $nodes machines need the address of machine 0 and a free port there"
  case $host in 127.* | localhost | ::1) refuse "--head $head: $nodes machines cannot meet there" ;; esac
  if [ "$node" != 0 ] && is_loopback "$host"; then
    refuse "--head $head: leads to this machine itself, and this is not machine 0: mend name resolution, or give its address"
  fi
  case " $*" in
  *' run.dir='*) ;;
  *) refuse "run.dir is missing: $nodes machines need one folder on a file system that they share" ;;
  esac
fi

prepare_environment prometheus tensorboard

# Checks everything in one process, so that a mistake is told once and before any rank starts; prints the run folder, and
# the one whose status to read, which of a dry run lies beside it.
check_configuration() {
  "$VENV/bin/python" - "$num_ranks" "$nodes" "$@" <<'PYTHON'
import sys
from pathlib import Path
from hopescale.config.compose import load_config
from hopescale.dry_run import beside
from hopescale.errors import UserError, describe
from hopescale.parallel.process_group import Launch
from hopescale.preflight import preflight
from hopescale.run_folder import make_run_folder
num_ranks, nodes = int(sys.argv[1]), int(sys.argv[2])
launch = Launch(world_size=nodes * num_ranks, local_world_size=num_ranks)
try:
    config = load_config(sys.argv[3:])
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
# The address by which the others reach this machine: its own name may lead nowhere there, or to loopback here.
own_address() {
  "$VENV/bin/python" -c 'import sys; from hopescale.addresses import source_address; print(source_address(sys.argv[1], 9))' "$host"
}
# Port 0 takes a free one.
meeting=(--rdzv-endpoint 127.0.0.1:0)
if [ "$nodes" != 1 ]; then
  own=$host
  [ "$node" = 0 ] || own=$(own_address) || refuse "--head $head: no way leads there from this machine"
  # torchrun would tell by names which machine the meeting place is. Minutes, because people start the machines.
  meeting=(--rdzv-endpoint "$head" --rdzv-conf "is_host=$((node == 0 ? 1 : 0)),read_timeout=600" --local-addr "$own")
fi
# No restarts inside the job: ranks of a second attempt would find addresses of the first.
"$VENV/bin/python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$num_ranks" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-id "$nodes-by-hand" "${meeting[@]}" -m hopescale.train "$@" &
launcher=$!
# Whether the run has begun; a dry run has none.
# shellcheck disable=SC2329 # a trap calls what calls it
has_begun() { [ "$speaking" = "$run" ] && [ "$(status_field "$run" incarnation)" != "$before" ]; }
# Rank 0 looks for this file once a second; a second signal is for whoever does not want to wait. Before the run has begun
# there is nothing to save, and the file would stop the next start.
# shellcheck disable=SC2329 # a trap calls it
stop() {
  if [ "$told" = 1 ] || ! has_begun; then
    kill -TERM "$launcher" 2>/dev/null || true
  else
    touch "$run/stop"
    echo "told to stop: asking for a checkpoint" >&2
  fi
  told=1
}
told=0
trap stop INT TERM
[ "$nodes" = 1 ] || echo "machine $node of $nodes: waiting at $head for all of them to be started, for 10 minutes" >&2
# A trapped signal ends `wait` early, so it is asked until the launcher is gone.
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done

# A dry run that does well leaves nothing.
if [ "$speaking" != "$run" ] && wait "$launcher"; then exit 0; fi
# Another machine writes it, and a shared file system takes its time to show it here.
for _ in 1 2 3 4 5 6 7 8 9 10; do
  state=$(status_field "$speaking" state) incarnation=$(status_field "$speaking" incarnation)
  if [ "$nodes" = 1 ] || { [ "$incarnation" != "$before" ] && [ "$state" != running ]; }; then break; fi
  sleep 1
done
if [ "$incarnation" = "$before" ] && [ "$told" = 1 ]; then
  echo "stopped before the run began" >&2
  exit 1
fi
if [ "$incarnation" = "$before" ] || [ -z "$state" ] || [ "$state" = running ]; then
  echo "crashed: $speaking/status.json is missing, old, or still says running" >&2
  exit 1
fi
code=$(status_field "$speaking" code)
echo "$state: $speaking" >&2
exit "$code"
