#!/usr/bin/env bash
# Prints the build argument that pins the base image to what its name stands for now.
#   docker build --build-arg "$(bash launch/container/pin.sh)" -t hopescale .
#   bash launch/container/pin.sh [IMAGE]       IMAGE instead of the Dockerfile's own base
#
# Asks the registry with the first of skopeo, docker, podman, buildah that is installed; the last two pull the image. What is
# pinned is the image for all platforms, except by buildah, which pins that for this machine's.
#   ENGINE  use this one
set -euo pipefail

REPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)

die() {
  printf 'pin.sh: %s\n' "$*" >&2
  exit 1
}

default_image() { sed -n 's/^ARG BASE_IMAGE=//p' "$REPO_ROOT/Dockerfile" | head -n 1; }

# The name with its registry: what a name without one means depends on who reads it.
qualified() {
  case $1 in
  localhost/* | *.*/* | *:*/*) printf '%s\n' "$1" ;;
  */*) printf 'docker.io/%s\n' "$1" ;;
  *) printf 'docker.io/library/%s\n' "$1" ;;
  esac
}

find_engine() {
  local candidate
  for candidate in skopeo docker podman buildah; do
    if command -v "$candidate" >/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "none of skopeo, docker, podman and buildah is installed: install one, on a machine that reaches the registry."
}

# digest ENGINE IMAGE
digest() {
  local manifest
  case $1 in
  skopeo)
    # By hand, of the bytes as they are: the digest of an image for many platforms is that of its list.
    manifest=$(mktemp)
    # shellcheck disable=SC2064 # this file, whatever the variable names later
    trap "rm -f '$manifest'" EXIT
    skopeo inspect --raw "docker://$2" >"$manifest" && sha256sum <"$manifest" | sed 's/^/sha256:/; s/ .*//'
    ;;
  docker) docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$2" ;;
  podman) podman pull --quiet "$2" >/dev/null && podman image inspect --format '{{.Digest}}' "$2" ;;
  buildah) buildah pull --quiet "$2" >/dev/null && buildah inspect --type image --format '{{.FromImageDigest}}' "$2" ;;
  *) die "ENGINE=$1: must be skopeo, docker, podman or buildah." ;;
  esac
}

[ $# -le 1 ] || die "usage: launch/container/pin.sh [IMAGE]"
image=${1:-$(default_image)}
[ -n "$image" ] || die "the Dockerfile has no line ARG BASE_IMAGE=."
case $image in *@*) die "$image: is pinned already; name it by its tag." ;; esac
image=$(qualified "$image")
engine=${ENGINE:-$(find_engine)}
found=$(digest "$engine" "$image") ||
  die "$engine could not read $image, see above: run this where its registry can be reached, or name an image that can."
[[ $found =~ ^sha256:[0-9a-f]{64}$ ]] || die "$engine gave no digest of $image but '$found'."
printf 'BASE_IMAGE=%s@%s\n' "$image" "$found"
