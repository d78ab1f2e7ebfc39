# shellcheck shell=bash
# Sourced by install_*.sh. Gives install_programs, which installs with apt-get, only what is missing, and starts no service.

# install_programs PROGRAM:PACKAGE...: packages as Debian and Ubuntu name them; a path of a file may take a program's place.
# Does nothing where all are there.
# Ends the script otherwise: with 0 once they are, 2 when they cannot be installed from here (not root, no apt-get), 1 when
# apt-get failed.
install_programs() {
  local packages
  mapfile -t packages < <(missing_packages "$@")
  [ ${#packages[@]} != 0 ] || exit 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    say "missing: ${packages[*]}. Install them as root, for example: apt-get install --no-install-recommends ${packages[*]}"
    exit 2
  fi
  say "installing ${packages[*]}"
  install_without_services "${packages[@]}" || { say "apt-get could not install ${packages[*]}, see above."; exit 1; }
  mapfile -t packages < <(missing_packages "$@")
  [ ${#packages[@]} = 0 ] || { say "apt-get installed no program of: ${packages[*]}"; exit 1; }
}

say() { printf '[%s] %s\n' "$(basename "$0" .sh)" "$*" >&2; }

is_there() {
  case $1 in
  /*) [ -e "$1" ] ;;
  # Daemons live in /usr/sbin, which is not on everybody's PATH.
  *) PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ;;
  esac
}

# The packages of programs that are not there, one a line.
missing_packages() {
  local need
  for need in "$@"; do
    is_there "${need%%:*}" || printf '%s\n' "${need##*:}"
  done | sort -u
}

# What systemd would start with the machine.
enabled_services() { find /etc/systemd/system -type l 2>/dev/null | sort || true; }

# install_without_services PACKAGE...: a policy that forbids every service action, laid over the machine's own (if any) where
# only apt-get and its children see it. A killed run leaves at most an empty file, which counts as no policy. Packages enable
# their services for the next boot all the same, which is taken back.
install_without_services() {
  local policy=/usr/sbin/policy-rc.d placed=0
  [ -e "$policy" ] || { : >"$policy" && placed=1; }
  forbid=$(mktemp) # not local: the trap reads it after the function has returned
  printf '#!/bin/sh\nexit 101\n' >"$forbid"
  chmod 755 "$forbid"
  # shellcheck disable=SC2064 # expanded now, on purpose
  trap "rm -f '$forbid'; [ $placed = 0 ] || rm -f '$policy'" EXIT
  local enabled code=0
  enabled=$(enabled_services)
  # shellcheck disable=SC2016 # expanded by that shell
  DEBIAN_FRONTEND=noninteractive unshare --mount bash -euc '
    mount --bind "$1" "$2"
    shift 2
    # Another apt-get may be at work, and package lists may be old or absent.
    get() { apt-get -q -o DPkg::Lock::Timeout=300 --no-remove "$@"; }
    get install -y --no-install-recommends "$@" || { get update && get install -y --no-install-recommends "$@"; }
  ' install "$forbid" "$policy" "$@" </dev/null >&2 || code=$?
  comm -13 <(echo "$enabled") <(enabled_services) | while read -r link; do rm -f -- "$link"; done
  return "$code"
}
