#!/usr/bin/env bash
# Installs what tests/integration/test_image.py needs, with apt-get and only if something is missing. Starts no service.
#
#   bash tests/integration/install_image_tools.sh
#
# Exit code: 0 when everything is there, 2 when it is missing and cannot be installed from here (not root, no apt-get),
# 1 when apt-get failed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=install_programs.sh
source "$(dirname "${BASH_SOURCE[0]}")/install_programs.sh"

install_programs buildah:buildah podman:podman catatonit:catatonit runc:runc mmdebstrap:mmdebstrap \
  mksquashfs:squashfs-tools gcc:gcc /usr/include/stdio.h:libc6-dev /usr/include/slurm/spank.h:libslurm-dev unshare:util-linux
