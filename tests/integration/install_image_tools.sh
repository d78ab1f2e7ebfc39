#!/usr/bin/env bash
# Installs what tests/integration/test_image.py needs, with apt-get and only if something is missing.
# Exit code: 0 when everything is there, 2 when it is missing and cannot be installed from here, 1 when apt-get failed.
set -euo pipefail

# FILE:PACKAGE, as Debian and Ubuntu name them.
NEEDS=(/usr/bin/buildah:buildah /usr/bin/podman:podman /usr/bin/catatonit:catatonit /usr/sbin/runc:runc
  /usr/bin/mmdebstrap:mmdebstrap /usr/bin/mksquashfs:squashfs-tools
  /usr/bin/gcc:gcc /usr/include/stdio.h:libc6-dev /usr/include/slurm/spank.h:libslurm-dev)

say() { printf '[install_image_tools] %s\n' "$*" >&2; }

missing_packages() {
  local need
  for need in "${NEEDS[@]}"; do [ -e "${need%%:*}" ] || printf '%s\n' "${need##*:}"; done
}

# Another apt-get may be at work, and package lists may be old or absent.
get() { DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@" </dev/null >&2; }

mapfile -t packages < <(missing_packages)
[ ${#packages[@]} != 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  say "missing: ${packages[*]}. Install them as root: apt-get install --no-install-recommends ${packages[*]}"
  exit 2
fi
say "installing ${packages[*]}"
get install -y --no-install-recommends "${packages[@]}" ||
  { get update && get install -y --no-install-recommends "${packages[@]}"; } || exit 1
mapfile -t packages < <(missing_packages)
[ ${#packages[@]} = 0 ] || { say "apt-get installed, but the files are not there, of: ${packages[*]}"; exit 1; }
