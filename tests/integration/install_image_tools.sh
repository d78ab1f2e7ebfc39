#!/usr/bin/env bash
# Installs what tests/integration/test_image.py needs, if any of it is missing. Debian or Ubuntu.
set -euo pipefail

# What has to be there -> the package that has it.
declare -A packages=(
  [/usr/bin/buildah]=buildah
  [/usr/bin/podman]=podman
  [/usr/bin/catatonit]=catatonit
  [/usr/sbin/runc]=runc
  [/usr/bin/mmdebstrap]=mmdebstrap
  [/usr/bin/mksquashfs]=squashfs-tools
  [/usr/bin/gcc]=gcc
  [/usr/include/stdio.h]=libc6-dev
  [/usr/include/slurm/spank.h]=libslurm-dev
)
missing=()
for file in "${!packages[@]}"; do
  [ -e "$file" ] || missing+=("${packages[$file]}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
  echo "install_image_tools.sh: no apt-get here; install ${missing[*]} in this system's own way." >&2
  exit 1
fi
if [ "$(id -u)" != 0 ]; then
  echo "install_image_tools.sh: only root can install: sudo apt-get install ${missing[*]}" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get install -y --no-install-recommends "${missing[@]}" ||
  { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; }; } </dev/null >&2
