#!/usr/bin/env bash
# Builds and runs the image on a machine that may reach no container registry. Everything lies in DIR; as root.
#
#   image.sh up DIR                                an own storage, and in it a Debian under the name of the base image
#   image.sh build DIR                             the image, by launch/container/build.sh, from a clone of HEAD
#   image.sh in DIR COMMAND...                     podman, buildah or what calls them, on that storage
#   image.sh run DIR ARGUMENT...                   `podman run`, as this kernel allows it
#   image.sh unpack DIR IMAGE FILE.sqsh            the image as one file, with its variables in /etc/environment
#   image.sh down DIR                              ends what still runs, and removes DIR
#
# Unlike a user's, this build takes the base from `up`, certificates and wheels from where pip's own configuration says
# (PYTHON, default python3, is asked), and does without a network namespace, which would need a bridge.
set -euo pipefail

REPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
# Written to by podman and runc wherever their storage lies; bound to folders of DIR here.
MACHINE_FOLDERS=(/var/lib/containers /run/runc)

die() {
  printf 'image.sh: %s\n' "$*" >&2
  exit 2
}

write_settings() {
  cat >"$DIR/storage.conf" <<CONF
[storage]
driver = "overlay"
graphroot = "$DIR/graph"
runroot = "$DIR/run"
CONF
  # Limits a container may have without raising any, and no service of systemd's: a bare machine has neither right.
  cat >"$DIR/containers.conf" <<CONF
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
runtime = "runc"
tmp_dir = "$DIR/tmp"
CONF
  # No registry is asked for a name without one.
  echo 'unqualified-search-registries = []' >"$DIR/registries.conf"
}

# in_own_mounts COMMAND...: whatever it mounts ends with it.
in_own_mounts() {
  local folder
  for folder in "${MACHINE_FOLDERS[@]}"; do
    mkdir -p "$DIR/machine$folder"
    [ -d "$folder" ] || { mkdir -p "$folder" && echo "$folder" >>"$DIR/made"; }
  done
  # shellcheck disable=SC2016 # expanded inside
  CONTAINERS_STORAGE_CONF=$DIR/storage.conf CONTAINERS_CONF=$DIR/containers.conf \
    CONTAINERS_REGISTRIES_CONF=$DIR/registries.conf \
    unshare --mount bash -c '
      set -euo pipefail
      dir=$1 folders=$2
      shift 2
      for folder in $folders; do mount --bind "$dir/machine$folder" "$folder"; done
      exec "$@"' image.sh "$DIR" "${MACHINE_FOLDERS[*]}" "$@"
}

base_image() { sed -n 's/^ARG BASE_IMAGE=//p' "$REPO_ROOT/Dockerfile"; }

up() {
  mkdir "$DIR" || die "$DIR: must not exist yet."
  touch "$DIR/made"
  write_settings
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' bookworm "$DIR/base.tar"
  in_own_mounts podman import --quiet "$DIR/base.tar" "$(base_image)"
  rm "$DIR/base.tar"
}

# What pip's environment or files say of a setting, or nothing.
pip_setting() {
  local python=${PYTHON:-python3}
  "$python" -m pip config get ":env:.$1" 2>/dev/null || "$python" -m pip config get "global.$1" 2>/dev/null || true
}

build() {
  local given=() wheels cert index path
  git clone --quiet --depth 1 "file://$REPO_ROOT" "$DIR/source"
  wheels=$(pip_setting find-links) cert=$(pip_setting cert) index=$(pip_setting index-url)
  for path in $wheels $cert; do
    [ ! -e "$path" ] || given+=(--volume "$path:$path:ro")
  done
  [ -z "$wheels" ] || given+=(--build-arg PIP_FIND_LINKS="$wheels")
  [ -z "$cert" ] || given+=(--build-arg PIP_CERT="$cert")
  [ -z "$index" ] || given+=(--build-arg PIP_INDEX_URL="$index")
  for path in $wheels; do
    ! compgen -G "$path/torch-2.13.*+cpu-*" >/dev/null || given+=(--build-arg TORCH_INDEX=none)
  done
  ENGINE=buildah in_own_mounts bash "$DIR/source/launch/container/build.sh" cpu \
    --isolation chroot --network host --pull-never ${given[@]+"${given[@]}"}
}

run() {
  in_own_mounts podman run --rm --no-healthcheck --cgroup-parent "/$CGROUP" "$@"
}

unpack() {
  local image=$1 file=$2
  # shellcheck disable=SC2016 # expanded inside
  in_own_mounts bash -c '
    set -euo pipefail
    container=$(buildah from --pull-never "$1")
    root=$(buildah mount "$container")
    buildah inspect --type image --format "{{range .OCIv1.Config.Env}}{{println .}}{{end}}" "$1" |
      sed "/^$/d" >"$root/etc/environment"
    mksquashfs "$root" "$2" -noappend -no-progress -quiet -comp lz4
    buildah rm "$container" >/dev/null' unpack "$image" "$file"
}

down() {
  [ -f "$DIR/containers.conf" ] || die "$DIR: is no folder that \`image.sh up\` made."
  in_own_mounts podman rm --force --all --time 0 >/dev/null
  local folder
  while read -r folder; do rmdir --ignore-fail-on-non-empty "$folder"; done <"$DIR/made"
  # One folder for each controller, where control groups are of version 1.
  find /sys/fs/cgroup -mindepth 1 -maxdepth 2 -type d -name "$CGROUP" -prune \
    -exec find {} -depth -type d -exec rmdir {} + \;
  rm -rf "$DIR"
}

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; }

[ $# -ge 2 ] || { usage; exit 2; }
command=$1 DIR=$(realpath -m "$2")
CGROUP=hopescale-$(basename "$DIR")
shift 2
case $command in
up | build | run | unpack | down) "$command" "$@" ;;
in) in_own_mounts "$@" ;;
*) usage; exit 2 ;;
esac
