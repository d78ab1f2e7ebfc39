#!/usr/bin/env bash
# Installs what tests/integration/slurm_cluster.sh runs, with apt-get and only if something is missing. Starts no service.
#
#   bash tests/integration/install_slurm.sh
#
# Exit code: 0 when everything is there, 2 when it is missing and cannot be installed from here (not root, no apt-get),
# 1 when apt-get failed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=install_programs.sh
source "$(dirname "${BASH_SOURCE[0]}")/install_programs.sh"

install_programs slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client srun:slurm-client scontrol:slurm-client \
  munged:munge ip:iproute2 unshare:util-linux nsenter:util-linux setpriv:util-linux mount:mount hostname:hostname
