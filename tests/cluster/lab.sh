#!/usr/bin/env bash
# A real Slurm of several virtual nodes on this machine, for the tests (Debian or Ubuntu, root).
#
#   lab.sh install               the packages, where they are missing; exit 3 where that is not possible
#   lab.sh up DIR NODES          start it; clients then set SLURM_CONF=DIR/slurm.conf
#   lab.sh kill-node DIR NAME    power cut; `lab.sh start-node DIR NAME` brings it back
#   lab.sh on-node DIR NAME COMMAND…   run a command with that node's view of the disks
#   lab.sh down DIR              end the jobs and every process of it, remove its network
#
# A node is a slurmd with its own network, host name and process space, so that the death of its first
# process takes everything on it along. Nothing outside DIR is changed but the network names below.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge libpmix2 iproute2)

install() {
    local missing=() package policy=/usr/sbin/policy-rc.d made=0
    for package in "${packages[@]}"; do
        [ "$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null)" = "install ok installed" ] ||
            missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "missing: ${missing[*]}; they need root and apt-get" >&2
        exit 3
    fi
    # Installing may not start a system-wide Slurm.
    [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && made=1; }
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >&2 || made+=failed
    [[ $made != 1* ]] || rm -f $policy
    [[ $made != *failed ]] || { echo "apt-get cannot install ${missing[*]}" >&2 && exit 3; }
}

settings() { # DIR: names that two clusters on one machine do not share
    lab=$(realpath "$1")
    export SLURM_CONF=$lab/slurm.conf
    local number
    number=$(cksum <<<"$lab" | cut -d' ' -f1)
    net=10.$((64 + number % 128)).$((number / 128 % 256))
    tag=d$((number % 100000))
    [ ! -f "$lab/nodes" ] || nodes=$(cat "$lab/nodes")
}

# The start time beside the number: a process number may have been given to another one since.
born() { awk '{sub(/^.*\) /, ""); if ($1 != "Z") print $20}' "/proc/$1/stat" 2>/dev/null || true; }

spawn() { # NAME COMMAND…
    local name=$1
    shift
    setsid nohup "$@" </dev/null >"$lab/log/$name.out" 2>&1 &
    echo "$! $(born $!)" >"$lab/pid/$name"
}

running() { # NAME: sets pid
    local start
    read -r pid start 2>/dev/null <"$lab/pid/$1" && [ -n "$start" ] && [ "$(born "$pid")" = "$start" ]
}

until_true() { # SECONDS COMMAND…: poll with a deadline
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $deadline ] || return 1
        read -rt 0.1 <> <(:) || true
    done
}

gone() { ! running "$1"; }

halt() { # NAME SIGNAL
    running "$1" || return 0
    kill "-$2" "$pid"
    until_true 10 gone "$1" || { running "$1" && kill -KILL "$pid"; }
}

configure() {
    local host i
    host=$(hostname -s)
    mkdir -p "$lab"/{pid,log,state,spool,tmp,dev}
    head -c 128 /dev/urandom >"$lab/key" && chmod 400 "$lab/key"
    # GPUs that are character devices: else CUDA_VISIBLE_DEVICES stays empty.
    for i in 0 1 2 3 4 5 6 7; do mknod -m 666 "$lab/dev/nvidia$i" c 1 3; done
    cat >"$SLURM_CONF" <<C
ClusterName=lab
SlurmctldHost=$host($net.254)
SlurmctldPort=6817
SlurmUser=root
SlurmdUser=root
# cred_expire is also the wait before a requeued job starts again; the default is two minutes
AuthInfo=socket=$lab/munge.sock,cred_expire=10
StateSaveLocation=$lab/state
SlurmdSpoolDir=$lab/spool/%n
TmpFS=$lab/tmp/%n
SlurmctldPidFile=$lab/spool/slurmctld.pid
SlurmdPidFile=$lab/spool/%n.pid
JobCompType=jobcomp/filetxt
JobCompLoc=$lab/finished
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
MailProg=/bin/true
GresTypes=gpu
ReturnToService=2
MinJobAge=3600
SlurmdTimeout=15
KillWait=15
JobRequeue=1
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
DefMemPerCPU=500
NodeName=n[1-$nodes] NodeAddr=$net.[1-$nodes] CPUs=16 RealMemory=64000 Gres=gpu:8 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE
C
    printf 'AutoDetect=off\nName=gpu File=%s/dev/nvidia[0-7]\n' "$lab" >"$lab/gres.conf"
    # Empty: each look-up of an address would wait ten seconds for a server that does not answer.
    : >"$lab/cgroup.conf" && : >"$lab/resolv.conf"
    { echo "127.0.0.1 localhost" && echo "$net.254 $host"; } >"$lab/hosts"
    for ((i = 1; i <= nodes; i++)); do echo "$net.$i n$i" >>"$lab/hosts"; done
}

network() {
    local i
    ip link add "${tag}br" type bridge
    ip addr add "$net.254/24" dev "${tag}br"
    ip link set "${tag}br" up
    for ((i = 1; i <= nodes; i++)); do
        ip netns add "$tag-n$i"
        ip link add "${tag}v$i" type veth peer name eth0 netns "$tag-n$i"
        ip link set "${tag}v$i" master "${tag}br" up
        ip -n "$tag-n$i" link set lo up
        ip -n "$tag-n$i" addr add "$net.$i/24" dev eth0
        ip -n "$tag-n$i" link set eth0 up
    done
}

start_node() { # NAME
    mkdir -p "$lab/spool/$1" "$lab/tmp/$1"
    # nsenter and not `ip netns exec`: that mounts a /sys without cgroups, and slurmd will not start.
    spawn "$1" nsenter "--net=/run/netns/$tag-$1" unshare --uts --pid --fork --kill-child --mount-proc \
        sh -c "hostname $1; mount --bind $lab/hosts /etc/hosts; mount --bind $lab/resolv.conf \
            /etc/resolv.conf; exec slurmd -D -N $1"
}

on_node() { # NAME COMMAND…
    running "$1" || { echo "node $1 is not running" >&2 && return 1; }
    nsenter "--mount=/proc/$pid/ns/mnt" "${@:2}"
}

munge_answers() { munge -n -S "$lab/munge.sock" >/dev/null 2>&1; }
all_idle() { [ "$(sinfo -hN -o %T 2>/dev/null | grep -c '^idle$')" = "$nodes" ]; }
no_jobs() { [ -z "$(squeue -h 2>/dev/null)" ]; }

up() {
    local i
    configure
    network
    spawn munged munged -F --force --key-file="$lab/key" --socket="$lab/munge.sock" \
        --pid-file="$lab/munged.pid" --log-file="$lab/log/munged.log" --seed-file="$lab/seed"
    until_true 20 munge_answers
    spawn slurmctld slurmctld -D
    for ((i = 1; i <= nodes; i++)); do start_node "n$i"; done
    until_true 60 all_idle || { sinfo -N && tail -n 5 "$lab"/log/* && return 1; } >&2
}

down() {
    local i
    squeue -h -o %A 2>/dev/null | sort -u | xargs -r scancel 2>/dev/null || true
    until_true 20 no_jobs || true
    for ((i = 1; i <= nodes; i++)); do halt "n$i" KILL; done
    halt slurmctld TERM
    halt munged TERM
    for ((i = 1; i <= nodes; i++)); do ip netns del "$tag-n$i" 2>/dev/null || true; done
    ip link del "${tag}br" 2>/dev/null || true
}

case "${1:-}" in
    install) install ;;
    up)
        mkdir -p "$2" && echo "$3" >"$2/nodes"
        settings "$2" && up
        ;;
    kill-node) settings "$2" && halt "$3" KILL ;;
    start-node) settings "$2" && start_node "$3" ;;
    on-node) settings "$2" && on_node "${@:3}" ;;
    down) settings "$2" && down ;;
    *)
        sed -n '2,8s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
esac
