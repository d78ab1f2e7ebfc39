#!/usr/bin/env bash
# Builds the image from this checkout with docker, podman or buildah.
#   bash launch/container/build.sh cpu  [ARGUMENT OF THE BUILD COMMAND]...     makes hopescale
#   bash launch/container/build.sh cuda [ARGUMENT OF THE BUILD COMMAND]...     makes hopescale:cuda
#
#   ENGINE  docker, podman or buildah (default: the first of them that is installed)
#   CUDA    version for `cuda`, as PyTorch's index spells it (default: cu130)
set -euo pipefail

REPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)

die() {
  printf '%s\n' "$*" >&2
  exit 2
}

find_engine() {
  local candidate
  for candidate in docker podman buildah; do
    if command -v "$candidate" >/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "no docker, podman or buildah is installed: install one of them, or name another by ENGINE=."
}

# What the label of the image says: the commit, and whether the checkout differs from it.
revision() {
  local commit
  commit=$(git -C "$REPO_ROOT" rev-parse HEAD 2>/dev/null) || {
    echo unknown
    return
  }
  [ -z "$(git -C "$REPO_ROOT" status --porcelain)" ] || commit+=-dirty
  printf '%s\n' "$commit"
}

case ${1:-} in
cpu) cuda='' tag=hopescale ;;
cuda) cuda=${CUDA:-cu130} tag=hopescale:cuda ;;
*) die "usage: launch/container/build.sh cpu|cuda [ARGUMENT OF THE BUILD COMMAND]..." ;;
esac
shift

engine=${ENGINE:-$(find_engine)}
command -v "$engine" >/dev/null || die "ENGINE=$engine is not installed."
# OCI's own format has no place for a health check.
case $(basename "$engine") in
docker) format=() ;;
podman | buildah) format=(--format docker) ;;
*) die "ENGINE=$engine: must be docker, podman or buildah." ;;
esac
cd "$REPO_ROOT"
exec "$engine" build ${format[@]+"${format[@]}"} --build-arg CUDA="$cuda" --build-arg REVISION="$(revision)" -t "$tag" "$@" .
