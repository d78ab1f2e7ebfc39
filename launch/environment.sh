# shellcheck shell=bash
# Sourced by the other scripts of this folder. Gives REPO_ROOT, VENV and prepare_environment; writes only to stderr,
# so that a script's standard output stays that of the command it starts.
#
#   PYTHON       interpreter to build .venv from (default: the first of python3, python3.13, python3.12, python3.11 that fits)
#   TORCH_INDEX  package index to take torch from; "default" takes whatever pip's own configuration offers
set -euo pipefail

REPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$REPO_ROOT/.venv
TORCH_RANGE='torch>=2.13,<2.14'
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
STAMP=$VENV/.hopescale-environment

say() { printf '[environment] %s\n' "$*" >&2; }

die() {
  printf '[environment] %s\n' "$*" >&2
  exit 1
}

venv_pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@" >&2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
    [ "$candidate" != "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not a Python from 3.11 to 3.13."
  done
  die "hopescale needs Python 3.11, 3.12 or 3.13: install one and run this again with PYTHON=/path/to/python3."
}

create_venv() {
  local python
  python=$(find_python)
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    # Debian ships the venv module without the part that installs pip.
    local package
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
      die "$python cannot make virtual environments: install it with 'sudo apt-get install $package' (or your system's equivalent)."
    fi
    say "installing $package with apt-get"
    { apt-get install -y --no-install-recommends "$package" ||
      { apt-get update && apt-get install -y --no-install-recommends "$package"; }; } </dev/null >&2 ||
      die "apt-get could not install $package: install it by hand and run this again."
  fi
  say "creating $VENV with $("$python" --version)"
  if ! "$python" -m venv "$VENV" >&2; then
    rm -rf "$VENV"
    die "$python could not create $VENV, see above."
  fi
}

# Everything that makes an installed environment stale, as one line.
environment_fingerprint() {
  "$VENV/bin/python" - "$REPO_ROOT" <<'PYTHON'
import hashlib, pathlib, sys
root = sys.argv[1]
content = pathlib.Path(root, "pyproject.toml").read_bytes() + f"\n{root}\n{sys.version}".encode()
print(hashlib.sha256(content).hexdigest())
PYTHON
}

installed_torch() {
  "$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true
}

# The newest build of the wanted torch that pip's own configuration offers for the CPU alone, or nothing.
configured_cpu_torch() {
  "$VENV/bin/python" -m pip --disable-pip-version-check index versions torch 2>/dev/null |
    grep -oE '\b2\.13\.[0-9]+\+cpu\b' | head -n 1 || true
}

# Before everything else: a requirement on torch met by another package would bring in whichever build comes first.
install_torch() {
  local index=${TORCH_INDEX:-} previous_index='' build
  [ ! -f "$VENV/.torch-index" ] || previous_index=$(<"$VENV/.torch-index")
  build=$(installed_torch)
  case $build in
  2.13.*)
    if [ -z "$index" ] || [ "$index" = "$previous_index" ]; then
      say "torch $build is already installed"
      return
    fi
    say "replacing torch $build: TORCH_INDEX changed to $index"
    venv_pip uninstall --quiet --yes torch
    ;;
  esac

  # --no-deps with a foreign index: what torch itself needs comes from pip's own configuration in the next step.
  if [ "$index" = default ]; then
    say "torch: the build that pip's configuration offers, because TORCH_INDEX=default"
    venv_pip install "$TORCH_RANGE"
  elif [ -n "$index" ]; then
    say "torch: from $index, because TORCH_INDEX says so"
    venv_pip install --no-deps --index-url "$index" "$TORCH_RANGE" ||
      die "TORCH_INDEX=$index gave no $TORCH_RANGE for this Python and platform."
  elif nvidia-smi -L >/dev/null 2>&1; then
    say "torch: the CUDA build, because nvidia-smi lists a GPU"
    venv_pip install "$TORCH_RANGE"
  elif [ "$(uname -s)" != Linux ]; then
    say "torch: the default build, which on $(uname -s) has no CUDA"
    venv_pip install "$TORCH_RANGE"
  else
    build=$(configured_cpu_torch)
    if [ -n "$build" ]; then
      say "torch: the CPU build $build that pip's configuration offers, because there is no GPU"
      venv_pip install "torch==$build"
    else
      say "torch: the CPU build from $TORCH_CPU_INDEX, because there is no GPU"
      venv_pip install --no-deps --index-url "$TORCH_CPU_INDEX" "$TORCH_RANGE" ||
        die "no CPU build of $TORCH_RANGE: set TORCH_INDEX to an index that has one, or TORCH_INDEX=default for the CUDA build (several GB)."
    fi
  fi
  printf '%s\n' "$index" >"$VENV/.torch-index"
}

# stamped LINE: of what the last installation left: fingerprint, extras, folder.
stamped() { [ ! -f "$STAMP" ] || sed -n "$1p" "$STAMP"; }

# with_stamped_extras EXTRA...: these and those of earlier calls, comma-separated.
with_stamped_extras() {
  local extras extra
  extras=$(stamped 2)
  for extra in "$@"; do
    case ",$extras," in
    *",$extra,"*) ;;
    *) extras=${extras:+$extras,}$extra ;;
    esac
  done
  printf '%s\n' "$extras"
}

is_prepared() {
  local torch_index=''
  [ "$(stamped 3)" = "$REPO_ROOT" ] && "$VENV/bin/python" -c 'import pip' 2>/dev/null || return 1
  [ ! -f "$VENV/.torch-index" ] || torch_index=$(<"$VENV/.torch-index")
  [ "$(with_stamped_extras "$@")" = "$(stamped 2)" ] && [ "$(environment_fingerprint)" = "$(stamped 1)" ] &&
    [ "${TORCH_INDEX:-$torch_index}" = "$torch_index" ]
}

# Until this shell ends. Machines that share this folder may come at the same time; not every one can lock files.
lock_installation() {
  local code=0
  command -v flock >/dev/null && { : >>"$VENV.lock"; } 2>/dev/null || return 0
  exec 9>>"$VENV.lock"
  flock --nonblock 9 2>/dev/null || code=$?
  case $code in
  0) ;;
  1)
    say "waiting for somebody else who installs into $VENV"
    flock 9
    ;;
  *) say "$VENV.lock cannot be locked on this file system: let nobody else install into $VENV now" ;;
  esac
}

install_environment() {
  local extras
  if [ -f "$STAMP" ] && [ "$(stamped 3)" != "$REPO_ROOT" ]; then
    say "$VENV was made in another folder: building it anew"
    rm -rf "$VENV"
  fi
  "$VENV/bin/python" -c 'import pip' 2>/dev/null || create_venv
  extras=$(with_stamped_extras "$@")
  rm -f "$STAMP"
  install_torch
  printf 'torch==%s\n' "$(installed_torch)" >"$VENV/constraints.txt"
  say "installing hopescale[$extras]"
  (cd "$REPO_ROOT" && venv_pip install --quiet -c "$VENV/constraints.txt" -e ".[$extras]") ||
    die "pip could not install hopescale[$extras], see above."
  printf '%s\n%s\n%s\n' "$(environment_fingerprint)" "$extras" "$REPO_ROOT" >"$STAMP"
  say "ready: torch $(installed_torch), hopescale[$extras]"
}

# prepare_environment EXTRA...: .venv holds hopescale, editable, with these extras and those of earlier calls.
prepare_environment() {
  export PIP_USER=0
  ! is_prepared "$@" || return 0
  (
    lock_installation
    # Whoever had the lock may have done it.
    is_prepared "$@" || install_environment "$@"
  )
}
