#!/usr/bin/env bash
# Compiles the plugin against the installed Slurm: compile.sh OUT.so
set -euo pipefail
[ $# = 1 ] || { echo "usage: compile.sh OUT.so" >&2; exit 2; }
exec gcc -std=gnu11 -O1 -Wall -Wextra -Werror -shared -fPIC -o "$1" "$(dirname "${BASH_SOURCE[0]}")/container_plugin.c"
