#!/bin/sh
# What mpirun calls in place of ssh: `enter.sh [-OPTION...] HOST COMMAND...` runs COMMAND on an emulated host.
# hosts.py has written EMULATED_HOSTS: "NAME:PID:CORES" for each host, with the process that holds its namespaces.
while case $1 in -*) true ;; *) false ;; esac; do shift; done
host=$1
shift
for entry in $EMULATED_HOSTS; do
  case $entry in "$host":*) place=${entry#*:} ;; esac
done
pid=${place%%:*} cores=${place#*:}
# Each host has temporary files of its own (launchers name theirs by process numbers, which hosts have in common), in
# memory that goes away with it.
export TMPDIR=/dev/shm
# Joined and given to a shell, as ssh does: mpirun has quoted it for that.
exec taskset --cpu-list "$cores" nsenter --target "$pid" --net --uts --mount --ipc \
  --pid="/proc/$pid/ns/pid_for_children" --wdns=/ sh -c "$*"
