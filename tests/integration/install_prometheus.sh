#!/usr/bin/env bash
# Installs Prometheus and Alertmanager from Debian's or Ubuntu's packages where they are missing; starts nothing.
#   bash tests/integration/install_prometheus.sh
#
# Exit codes: 0 all programs are there, 1 apt-get failed, 2 only root on a machine with apt-get could install them.
set -euo pipefail

# Program -> package that holds it.
declare -A package_of=(
  [prometheus]=prometheus
  [promtool]=prometheus
  [prometheus-alertmanager]=prometheus-alertmanager
  [amtool]=prometheus-alertmanager
)

missing_packages() {
  local program
  for program in "${!package_of[@]}"; do
    command -v "$program" >/dev/null || printf '%s\n' "${package_of[$program]}"
  done | sort -u
}

mapfile -t missing < <(missing_packages)
if [ ${#missing[@]} = 0 ]; then exit 0; fi

install=(apt-get install -y --no-install-recommends "${missing[@]}")
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "missing: ${missing[*]}. Install with: sudo ${install[*]}" >&2
  exit 2
fi

# What the packages would start is not wanted: tests start their own, on ports of their own. Images without an init
# have a policy that says so; elsewhere one is put in place for the time of the installation.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi

# Another package manager may be at work on the machine.
wait_for_lock=(-o DPkg::Lock::Timeout=300)
export DEBIAN_FRONTEND=noninteractive
"${install[@]}" "${wait_for_lock[@]}" </dev/null >&2 ||
  { apt-get update "${wait_for_lock[@]}" >&2 && "${install[@]}" "${wait_for_lock[@]}" </dev/null >&2; } ||
  { echo "apt-get could not install ${missing[*]}, see above" >&2; exit 1; }

mapfile -t missing < <(missing_packages)
if [ ${#missing[@]} != 0 ]; then
  echo "apt-get succeeded, and still no program of: ${missing[*]}" >&2
  exit 1
fi
