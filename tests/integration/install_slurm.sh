#!/usr/bin/env bash
# Installs what tests/integration/slurm_cluster.sh runs, with apt-get and only if something is missing. Starts no service.
#
#   bash tests/integration/install_slurm.sh
#
# Exit code: 0 when everything is there, 2 when it is missing and cannot be installed from here (not root, no apt-get),
# 1 when apt-get failed.
set -euo pipefail

# PROGRAM:PACKAGE, as Debian and Ubuntu name them.
NEEDS=(slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client srun:slurm-client scontrol:slurm-client munged:munge
  ip:iproute2 unshare:util-linux nsenter:util-linux setpriv:util-linux mount:mount hostname:hostname)

say() { printf '[install_slurm] %s\n' "$*" >&2; }

# The packages of programs that are not there, one a line.
missing_packages() {
  local need
  for need in "${NEEDS[@]}"; do
    # The daemons live in /usr/sbin, which is not on everybody's PATH.
    PATH=$PATH:/usr/sbin:/sbin command -v "${need%%:*}" >/dev/null || printf '%s\n' "${need##*:}"
  done | sort -u
}

# install_without_services PACKAGE...: a policy that forbids every service action, laid over the machine's own (if any) where
# only apt-get and its children see it. A killed run leaves at most an empty file, which counts as no policy.
install_without_services() {
  local policy=/usr/sbin/policy-rc.d placed=0
  [ -e "$policy" ] || { : >"$policy" && placed=1; }
  forbid=$(mktemp) # not local: the trap reads it after the function has returned
  printf '#!/bin/sh\nexit 101\n' >"$forbid"
  chmod 755 "$forbid"
  # shellcheck disable=SC2064 # expanded now, on purpose
  trap "rm -f '$forbid'; [ $placed = 0 ] || rm -f '$policy'" EXIT
  # shellcheck disable=SC2016 # expanded by that shell
  DEBIAN_FRONTEND=noninteractive unshare --mount bash -euc '
    mount --bind "$1" "$2"
    shift 2
    # Another apt-get may be at work, and package lists may be old or absent.
    get() { apt-get -q -o DPkg::Lock::Timeout=300 "$@"; }
    get install -y --no-install-recommends "$@" || { get update && get install -y --no-install-recommends "$@"; }
  ' install "$forbid" "$policy" "$@" </dev/null >&2
}

mapfile -t packages < <(missing_packages)
[ ${#packages[@]} != 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  say "missing: ${packages[*]}. Install them as root, for example: apt-get install --no-install-recommends ${packages[*]}"
  exit 2
fi
say "installing ${packages[*]}"
install_without_services "${packages[@]}" || { say "apt-get could not install ${packages[*]}, see above."; exit 1; }
mapfile -t packages < <(missing_packages)
[ ${#packages[@]} = 0 ] || { say "apt-get installed no program of: ${packages[*]}"; exit 1; }
