#!/usr/bin/env bash
# Makes .venv-rivals, an environment with the libraries that tests/benchmarks/data.py compares with, pinned in
# rivals_requirements.txt. torch comes first, from where launch/environment.sh takes it, so that no other build comes in.
#
#   bash tests/benchmarks/rivals.sh
#
# A library that cannot be installed does not keep the others away: the reason is printed, and the benchmark says "not
# installed" in its rows. Exit code: 0 when all can be imported, 1 otherwise.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR/../../launch source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../launch/environment.sh"

VENV=$REPO_ROOT/.venv-rivals
PINS=$REPO_ROOT/tests/benchmarks/rivals_requirements.txt
RIVALS=(webdataset litdata mosaicml-streaming zarr)
export PIP_USER=0

"$VENV/bin/python" -c 'import pip' 2>/dev/null || create_venv
install_torch
{
  printf 'torch==%s\n' "$(installed_torch)"
  cat "$PINS"
} >"$VENV/constraints.txt"

failed=()
for rival in "${RIVALS[@]}"; do
  pin=$(grep -i "^$rival==" "$PINS")
  say "installing $pin"
  if ! "$VENV/bin/python" -m pip --disable-pip-version-check install --quiet -c "$VENV/constraints.txt" "$pin" \
    >"$VENV/install.log" 2>&1; then
    say "$pin cannot be installed:"
    grep -v '^WARNING' "$VENV/install.log" | tail -n 20 >&2
    failed+=("$rival")
  fi
done

# With the words that the benchmark will use for its rows.
(cd "$REPO_ROOT" && "$VENV/bin/python" -m tests.benchmarks.data_rivals --versions) || failed+=(imports)
[ ${#failed[@]} = 0 ] || die "not everything is there: ${failed[*]}, see above."
say "ready: $VENV"
