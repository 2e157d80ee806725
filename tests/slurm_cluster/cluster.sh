#!/bin/bash
# A real SLURM cluster on one machine: each node is a network + UTS + mount namespace with its own address and host name,
# joined by a bridge. Controller and submitting client are the node "ctl". Needs root and slurmctld slurmd slurm-client munge.
#   cluster.sh up DIR PREFIX NODES | down DIR PREFIX | in DIR NODE COMMAND...
#   cluster.sh cut|heal|crash|boot DIR NODE          cable out, cable in, power loss, slurmd again
#   cluster.sh part|join DIR NODE OTHER              no route between two nodes, that the controller reaches all the same
# PREFIX names the namespaces, so clusters side by side do not meet: the subnet 10.77.0.0/24 lives inside them only.
set -euo pipefail
action=$1 directory=$2
export SLURM_CONF=$directory/etc/slurm.conf

# Run in the namespaces of a node. Not `ip netns exec`, which remounts /sys without /sys/fs/cgroup: slurmd then refuses.
enter() {
  local node=$1
  shift
  # shellcheck disable=SC2016 # expanded inside; nsenter -m loses the working directory
  nsenter -t "$(cat "$directory/run/holder.$node.pid")" -n -u -m sh -c 'cd "$0" && exec "$@"' "$PWD" "$@"
}

alive() { # a zombie may wait long for process 1: it counts as gone
  local state
  state=$(sed 's/.*) //; s/ .*//' "/proc/$1/stat" 2>/dev/null) && [ "$state" != Z ]
}

stop_daemon() {
  local pid
  [ -s "$1" ] || return 0
  pid=$(cat "$1")
  kill "$pid" 2>/dev/null || return 0
  for _ in $(seq 100); do alive "$pid" || return 0; sleep 0.05; done
  kill -9 "$pid" 2>/dev/null || true
}

make_namespace() { # name, address: with a holder process that keeps the namespaces and is the handle for nsenter
  local node=$1 space=$prefix-$1
  ip netns add "$space"
  ip link add "p-$node" netns "$prefix-sw" type veth peer name eth0 netns "$space"
  ip netns exec "$prefix-sw" ip link set "p-$node" master br0 up
  ip netns exec "$space" sh -c "ip link set lo up; ip addr add $2/24 dev eth0; ip link set eth0 up"
  # Own /dev/shm and PMIx directory: nodes that share them collide. Own /etc/hosts: no trace outside.
  nsenter --net="/run/netns/$space" unshare -u -m bash -c "
    hostname $node; mount --make-rprivate /; mount --bind '$directory/etc/hosts' /etc/hosts
    mount -t tmpfs -o size=1g tmpfs /dev/shm; mount -t tmpfs tmpfs '$directory/pmix'
    echo \$\$ > '$directory/run/holder.$node.pid.new'; mv '$directory/run/holder.$node.pid.new' '$directory/run/holder.$node.pid'
    exec sleep infinity" </dev/null >/dev/null 2>&1 &
}

write_configuration() {
  mkdir -p "$directory"/{run,log,state,etc,dev,munge,pmix,spool}
  chmod 755 "$directory" "$directory"/{run,log}
  chmod 700 "$directory/munge"
  (umask 077 && dd if=/dev/urandom of="$directory/munge/key" bs=1024 count=1 status=none)
  # gres needs device nodes, else CUDA_VISIBLE_DEVICES stays empty: copies of /dev/null
  for gpu in 0 1 2 3; do mknod "$directory/dev/nvidia$gpu" c 1 3; done
  printf '127.0.0.1 localhost\n10.77.0.254 ctl\n' > "$directory/etc/hosts"
  echo "CgroupAutomount=no" > "$directory/etc/cgroup.conf"
  echo "PMIxCliTmpDirBase=$directory/pmix" > "$directory/etc/mpi.conf"
  cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=ctl(10.77.0.254)
SlurmctldPort=6817
SlurmdPort=6818
SrunPortRange=60001-62000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$directory/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool/%n
SlurmctldPidFile=$directory/run/slurmctld.pid
SlurmdPidFile=$directory/run/slurmd.%n.pid
SlurmctldLogFile=$directory/log/slurmctld.log
SlurmdLogFile=$directory/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$directory/log/jobcomp.txt
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=30
MinJobAge=300
KillWait=10
UnkillableStepTimeout=30
BatchStartTimeout=10
MessageTimeout=10
TCPTimeout=2
JobRequeue=1
PropagateResourceLimits=NONE
DefMemPerCPU=500
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
CONF
  : > "$directory/etc/gres.conf"
  for number in $(seq "$nodes"); do
    mkdir -p "$directory/spool/node$number"
    echo "10.77.0.$number node$number" >> "$directory/etc/hosts"
    echo "NodeName=node$number NodeAddr=10.77.0.$number CPUs=8 RealMemory=8000 Gres=gpu:4 State=UNKNOWN" >> "$SLURM_CONF"
    echo "NodeName=node$number Name=gpu File=$directory/dev/nvidia[0-3]" >> "$directory/etc/gres.conf"
  done
}

up() {
  write_configuration
  echo "$prefix" > "$directory/run/prefix"
  ip netns add "$prefix-sw"
  ip netns exec "$prefix-sw" sh -c "ip link add br0 type bridge; ip link set br0 up"
  make_namespace ctl 10.77.0.254
  for number in $(seq "$nodes"); do make_namespace "node$number" "10.77.0.$number"; done
  for node in ctl $(seq -f node%g "$nodes"); do
    for _ in $(seq 100); do [ -s "$directory/run/holder.$node.pid" ] && break; sleep 0.05; done
  done
  munged --force --key-file="$directory/munge/key" --socket="$directory/run/munge.sock" \
    --pid-file="$directory/run/munged.pid" --log-file="$directory/log/munged.log" --seed-file="$directory/munge/seed"
  enter ctl slurmctld -f "$SLURM_CONF" -c
  for number in $(seq "$nodes"); do enter "node$number" slurmd -f "$SLURM_CONF" -N "node$number" -c; done
  for _ in $(seq 300); do
    [ "$(enter ctl sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" -ge "$nodes" ] && return 0
    sleep 0.1
  done
  enter ctl sinfo -N -l
  tail -n 20 "$directory"/log/*.log
  return 1
}

down() {
  for file in "$directory"/run/slurmd.*.pid "$directory"/run/slurmctld.pid "$directory"/run/munged.pid; do
    stop_daemon "$file"
  done
  # slurmstepd and jobs outlive slurmd by design; what sits in our namespaces is ours
  for space in $(ip netns list | awk '{print $1}' | grep -E "^$prefix-(sw|ctl|node[0-9]+)$" || true); do
    for pid in $(ip netns pids "$space"); do kill -9 "$pid" 2>/dev/null || true; done
    ip netns del "$space"
  done
}

case $action in
up) prefix=$3 nodes=$4 && up ;;
down) prefix=$3 && down ;;
in) node=$3 && shift 3 && enter "$node" "$@" ;;
boot) enter "$3" slurmd -f "$SLURM_CONF" -N "$3" -c ;;
part | join)
  prefix=$(cat "$directory/run/prefix")
  verb=$([ "$action" = part ] && echo add || echo del)
  ip netns exec "$prefix-$3" ip route "$verb" blackhole "10.77.0.${4#node}/32"
  ip netns exec "$prefix-$4" ip route "$verb" blackhole "10.77.0.${3#node}/32"
  ;;
cut | heal | crash)
  prefix=$(cat "$directory/run/prefix")
  case $action in
  cut) ip netns exec "$prefix-sw" ip link set "p-$3" down ;;
  heal) ip netns exec "$prefix-sw" ip link set "p-$3" up ;;
  crash)
    holder=$(cat "$directory/run/holder.$3.pid")
    for pid in $(ip netns pids "$prefix-$3"); do [ "$pid" = "$holder" ] || kill -9 "$pid" 2>/dev/null || true; done
    ;;
  esac
  ;;
*) echo "unknown action $action" >&2 && exit 2 ;;
esac
