#!/usr/bin/env bash
# A Slurm cluster of N nodes on this machine, for tests. Needs root and what install_slurm.sh installs.
#
#   slurm_cluster.sh up DIR N                     bring it up, with its files in DIR; returns when all nodes are idle
#   slurm_cluster.sh hold DIR N                   the same in the foreground: says "up", and ends with the cluster
#   slurm_cluster.sh run DIR COMMAND [ARGUMENT]   run a command as on the login node: sbatch, curl http://n1:9400 ...
#   slurm_cluster.sh crash DIR INDEX              node n<INDEX> loses its power
#   slurm_cluster.sh start DIR INDEX              switch it on again; returns when Slurm takes it for alive
#   slurm_cluster.sh cut DIR INDEX                unplug its network cable; its processes go on
#   slurm_cluster.sh mend DIR INDEX               plug it in again
#   slurm_cluster.sh down DIR                     end everything; DIR stays, for its logs
#
# Nodes are called n1 ... nN and have, on paper, 4 CPUs, 4 GPUs (character devices without a function) and 64 GB each.
# Partitions:
#   ci           default, at most 1 hour
#   long         at most 1 day, one node
#   urgent       takes nodes from jobs of the others: they get the signal of their --signal at once, and are requeued after 30 s
#   restricted   for an account that nobody has: refuses all
# SPANK_PLUGIN=/path/to/plugin.so loads a SPANK plugin.
#
# All of it lives in one room: a pid, network, mount, uts and ipc namespace, in which every node has its own of each kind.
# Killing the first process of the room ends every process of the cluster, and with the last of them the kernel takes back
# networks and mounts. So nothing can be left over, and rooms have the same addresses, ports and names without meeting.
set -euo pipefail
# The daemons live where not everybody's PATH leads.
PATH=$PATH:/usr/sbin:/sbin

SELF=$(realpath "${BASH_SOURCE[0]}")
NET=10.77.0
PATIENCE=30 # seconds until something that takes one or two counts as failed

die() {
  printf '[slurm_cluster] %s\n' "$*" >&2
  exit 1
}

usage() {
  sed -n '2,/^# SPANK_PLUGIN/s/^# \{0,1\}//p' "$SELF" >&2
  exit 2
}

# until_true WHAT COMMAND...: polls a command until it succeeds.
until_true() {
  local what=$1 deadline=$((SECONDS + PATIENCE))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$deadline" ] || die "$what: not within $PATIENCE s"
    sleep 0.1
  done
}

# pid_of NAME: the first process of the room or of a node, as numbered outside. Fails when it is gone; a number that now
# belongs to another program does not count.
pid_of() {
  local pid words
  read -r pid 2>/dev/null <"$D/run/$1.pid" || return 1
  mapfile -d '' words 2>/dev/null <"/proc/$pid/cmdline" || return 1
  [ "${words[*]:2:2}" = "$1 $D" ] || return 1
  printf '%s\n' "$pid"
}

is_gone() { ! pid_of "$1" >/dev/null; }

need_room() { ROOM=$(pid_of room) || die "no cluster is up in $D"; }

# Becomes the command, so that whoever kills this shell kills the command.
enter() { exec nsenter --target "$ROOM" --net --mount --uts --ipc -- env --chdir="$PWD" SLURM_CONF="$D/slurm.conf" "$@"; }

write_configuration() {
  local nodes=$1 i gpu
  # No name server: a look-up that goes out of a closed network waits 10 s before it fails.
  printf '%s: files\n' passwd group shadow hosts >"$D/nsswitch.conf"
  {
    printf '127.0.0.1 localhost\n%s.1 login\n' "$NET"
    for ((i = 1; i <= nodes; i++)); do printf '%s.%d n%d\n' "$NET" $((10 + i)) "$i"; done
  } >"$D/hosts"
  # Slurm refuses plain files as GPUs.
  for gpu in 0 1 2 3; do mknod "$D/dev/gpu$gpu" c 1 3; done
  printf 'AutoDetect=off\nNodeName=n[1-%d] Name=gpu File=%s/dev/gpu[0-3]\n' "$nodes" "$D" >"$D/gres.conf"
  : >"$D/cgroup.conf"
  [ -z "${SPANK_PLUGIN:-}" ] || printf 'required %s\n' "$SPANK_PLUGIN" >"$D/plugstack.conf"
  # cred_expire: a requeued job may not start before; 120 s without it.
  # config_overrides: nodes may claim more than the machine has.
  # ReturnToService=2: a node that was down is taken back as soon as it registers.
  # EnforcePartLimits: refuse at submission what could never start, instead of leaving it pending.
  # SlurmdTimeout, MessageTimeout: a node that does not answer is down after 10 to 20 s.
  # linuxproc, no cgroups: the machine's own stay untouched. A process that leaves its job's tree outlives the job.
  cat >"$D/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=login($NET.1)
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.self
SlurmdPidFile=$D/run/slurmd-%n.self
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.txt
PlugStackConfig=$D/plugstack.conf
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout=6
MessageTimeout=5
KillWait=5
JobRequeue=1
GresTypes=gpu
NodeName=DEFAULT CPUs=4 RealMemory=64000 Gres=gpu:4
PartitionName=DEFAULT Nodes=ALL State=UP GraceTime=30
PartitionName=ci Default=YES MaxTime=1:00:00
PartitionName=long MaxTime=1-00:00:00 MaxNodes=1
PartitionName=urgent MaxTime=1:00:00 PriorityTier=2 PreemptMode=OFF
PartitionName=restricted MaxTime=1:00:00 AllowAccounts=research
CONF
  for ((i = 1; i <= nodes; i++)); do printf 'NodeName=n%d NodeAddr=%s.%d\n' "$i" "$NET" $((10 + i)); done >>"$D/slurm.conf"
}

# What a process of the room and one of a node see of the machine's files, besides everything else.
lay_files() {
  local name
  for name in hosts nsswitch.conf; do mount --bind "$D/$name" "/etc/$name"; done
}

# remember NAME: called in a new pid namespace before it gets its own /proc, so that the number is the one known outside.
remember() {
  local pid
  read -r pid _ </proc/self/stat
  printf '%s\n' "$pid" >"$D/run/$1.pid"
}

# The rest of the life of a first process, which takes in orphans: bash buries them while it waits.
linger() {
  sleep infinity &
  while :; do wait; done
}

room() {
  local nodes=$1 i
  remember room
  hostname login
  lay_files
  # No service of the machine is within reach, a cache of names for example, and munge has its usual place for itself.
  mount -t tmpfs tmpfs /run
  mkdir -m 755 /run/munge
  ip link set lo up
  ip link add br0 type bridge
  ip addr add "$NET.1/24" dev br0
  ip link set br0 up
  munged --foreground --force --key-file="$D/run/munge.key" --log-file="$D/log/munged.log" --seed-file="$D/run/munge.seed" \
    >"$D/log/munged.out" 2>&1 &
  until_true "munged has a socket" test -S /run/munge/munge.socket.2
  # Slurm re-reads its configuration after it has changed its folder, so the path is absolute.
  slurmctld -D -c -f "$D/slurm.conf" >"$D/log/slurmctld.out" 2>&1 &
  ROOM=$(<"$D/run/room.pid")
  for ((i = 1; i <= nodes; i++)); do switch_on "$i"; done
  linger
}

# switch_on INDEX [PREFIX...]: the prefix enters the room. File 3 is the room's network, to which the node connects itself.
switch_on() {
  local i=$1
  shift
  "$@" setsid --fork unshare --net --ipc --uts --mount --pid --fork --kill-child=KILL \
    bash "$SELF" "n$i" "$D" "$i" 3<"/proc/$ROOM/ns/net" </dev/null >>"$D/log/n$i.out" 2>&1
}

node() {
  local i=$1
  remember "n$i"
  mount -t proc proc /proc
  # Shared memory is not shared with other nodes: its files are often named by process ids, which repeat.
  mount -t tmpfs tmpfs /dev/shm
  hostname "n$i"
  ip link set lo up
  # The kernel takes the old cable away a moment after a crash.
  nsenter --net=/proc/self/fd/3 ip link del "n$i" 2>/dev/null || true
  ip link add eth0 type veth peer name "n$i" netns /proc/self/fd/3
  ip addr add "$NET.$((10 + i))/24" dev eth0
  ip link set eth0 up
  nsenter --net=/proc/self/fd/3 ip link set "n$i" master br0 up
  exec 3<&-
  mkdir -p "$D/spool/n$i"
  slurmd -D -N "n$i" -f "$D/slurm.conf" &
  linger
}

all_idle() { [ "$(enter timeout 3 sinfo --noheader --states=idle --format=%D 2>/dev/null)" = "$1" ]; }

# Slurm may not have noticed yet that the node was off, so its word alone says little.
is_alive() {
  local state
  (enter timeout 3 bash -c "</dev/tcp/$1/6818") 2>/dev/null || return 1
  state=$(enter timeout 3 sinfo --noheader --nodes="$1" --format=%t 2>/dev/null) || return 1
  # A star: does not answer.
  case $state in '' | down* | unk* | *\*) return 1 ;; esac
}

# bring_up N [PREFIX...]: starts the room in the background, by the words of the prefix.
bring_up() {
  local nodes=$1 folder folders=(dev log run spool state)
  shift
  [ -z "${SPANK_PLUGIN:-}" ] || [ -f "$SPANK_PLUGIN" ] ||
    die "SPANK_PLUGIN=$SPANK_PLUGIN: there is no such file, give the path of a SPANK plugin or unset it"
  for folder in "${folders[@]}"; do
    [ -e "$D/.slurm_cluster" ] || [ ! -e "$D/$folder" ] ||
      die "DIR=$D: it has a folder $folder that is not of a cluster, choose a new folder"
  done
  take_down
  mkdir -p "$D"
  : >"$D/.slurm_cluster"
  (cd "$D" && rm -rf "${folders[@]}" plugstack.conf && mkdir -m 755 "${folders[@]}")
  (umask 077 && head -c 128 /dev/urandom >"$D/run/munge.key")
  write_configuration "$nodes"
  "$@" unshare --net --ipc --uts --mount --pid --fork --kill-child=KILL \
    bash "$SELF" room "$D" "$nodes" </dev/null >"$D/log/room.out" 2>&1 &
  local child=$! deadline=$((SECONDS + PATIENCE))
  until ROOM=$(pid_of room) && all_idle "$nodes"; do
    if [ "$SECONDS" -ge "$deadline" ] || ! kill -0 "$child" 2>/dev/null; then
      take_down
      tail -n 15 "$D"/log/* >&2
      die "the cluster did not come up within $PATIENCE s, see above and $D/log"
    fi
    sleep 0.1
  done
}

take_down() {
  local pid
  pid=$(pid_of room) || return 0
  kill -KILL "$pid" 2>/dev/null || true
  until_true "the end of the cluster" is_gone room
}

[ $# -ge 2 ] || usage
command=$1 D=$(realpath -m "$2")
shift 2
[[ $D =~ ^[A-Za-z0-9/._+-]+$ ]] ||
  die "DIR=$D: slurm.conf takes no other characters than letters, digits and /._+-, choose another folder"
[ "$(id -u)" = 0 ] || die "namespaces and networks of their own need root: run it as root"

# What INDEX names, for commands that take one.
index() {
  [[ $# = 1 && $1 =~ ^[1-9][0-9]*$ ]] || usage
  need_room
  grep -q "^NodeName=n$1 " "$D/slurm.conf" || die "the cluster in $D has no node n$1"
  i=$1
}

case $command in
up | hold)
  [[ $# = 1 && $1 =~ ^[1-9][0-9]*$ && $1 -le 99 ]] || usage
  if [ "$command" = up ]; then
    bring_up "$1" setsid
  else
    # Should whoever holds the cluster be killed, the kernel kills the room in turn.
    bring_up "$1" setpriv --pdeathsig KILL
    echo up
    wait
  fi
  ;;
down) take_down ;;
run)
  [ $# -ge 1 ] || usage
  need_room
  enter "$@"
  ;;
crash)
  index "$@"
  pid=$(pid_of "n$i") || die "n$i is off already"
  # Unplugged first, or the kernel would close connections for it: a machine without power says no goodbye.
  (enter ip link set "n$i" down)
  kill -KILL "$pid"
  until_true "the end of n$i" is_gone "n$i"
  ;;
start)
  index "$@"
  is_gone "n$i" || die "n$i is on already"
  switch_on "$i" nsenter --target "$ROOM" --pid --net --mount --uts --ipc --
  until_true "n$i answers Slurm" is_alive "n$i"
  ;;
cut | mend)
  index "$@"
  is_gone "n$i" && die "n$i is off: start it first"
  state=down
  [ "$command" = cut ] || state=up
  (enter ip link set "n$i" "$state")
  ;;
# Not for users: the first processes of the room and of a node.
room) room "$@" ;;
n[1-9]*) node "$@" ;;
*) usage ;;
esac
