#!/usr/bin/env python3
"""A Slurm cluster on one machine, for tests and to try jobs on: real daemons, nodes that share nothing but files.

    sudo env "PATH=$PATH" jobs/local/slurm.py with 4 -- srun --nodes=4 --mpi=pmi2 mpidl train jobs/digits.toml

or step by step: `slurm.py up 4`, `slurm.py run -- sbatch jobs/train.sbatch` (or `run` alone: a shell) as often as you
like, `slurm.py off host3`, which is a power failure, `slurm.py on host3`, `slurm.py down`.

Files are those of the machine, as on a cluster with a shared file system, but for temporary ones: TMPDIR is
each node's own. What the cluster is made of is in cluster.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cluster import (
    TOOLS,
    Cluster,
    environment,
    load,
    power_off,
    power_on,
    start,
    wait_until_removed,
)
from hosts import PREFERRED, ended, positive
from namespaces import INTERFACE, HostsError, check_machine, find, keep, take_down

KEEPER = "MPIDL_SLURM_KEEPER"
"""The variable in which whoever holds the lifeline of a cluster that stays up has its record."""

REQUIRED = {
    "TMPDIR": "/dev/shm",
    "HYDRA_IFACE": INTERFACE,
    "FI_TCP_IFACE": INTERFACE,
    "OMPI_MCA_btl_tcp_if_include": INTERFACE,
    "GLOO_SOCKET_IFNAME": INTERFACE,
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
"""Variables in any case: nodes have no other interface, and the user is root."""


def line_of(cluster: Cluster, command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command that runs in the head, and its environment, which Slurm gives to jobs."""
    env = environment(cluster, PREFERRED | os.environ | REQUIRED)
    if sys.prefix != sys.base_prefix:  # this Python's virtual environment, activated or not
        env["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), env["PATH"]])
    return [*cluster.enter_head(), *(command or [env.get("SHELL", "sh")])], env


def made(args: argparse.Namespace) -> tuple[Cluster, int]:
    """A new cluster of the size that the command line says, and its lifeline."""
    return start(args.nodes, args.cpus, args.rate)


def found(name: str) -> tuple[Cluster, int] | None:
    """The cluster that `up` has made under this name, and its keeper."""
    if (known := find(KEEPER, name)) is None:
        return None
    record, keeper = known
    return load(Path(record["directory"])), keeper


def running(name: str) -> Cluster:
    """The same, where there has to be one."""
    if (known := found(name)) is None:
        raise HostsError(f"no cluster named {name} is up; first: slurm.py up 4 --name {name}")
    return known[0]


def command_up(args: argparse.Namespace) -> int:
    """Bring a cluster up and leave it."""
    if known := found(args.name):
        there = f"a cluster named {args.name} of {len(known[0].nodes)} nodes is up already"
        raise HostsError(f"{there}; first: slurm.py down --name {args.name}")
    cluster, lifeline = made(args)
    keep(KEEPER, {"name": args.name, "directory": str(cluster.directory)}, lifeline)
    print(f"{', '.join(cluster.nodes)}: {args.cpus} CPUs each, as Slurm sees it; configuration and logs in "
          f"{cluster.directory}")  # fmt: skip
    return 0


def command_run(args: argparse.Namespace) -> NoReturn:
    """Become the command."""
    line, env = line_of(running(args.name), args.command)
    os.execvpe(line[0], line, env)


def command_off(args: argparse.Namespace) -> int:
    """Switch a node off."""
    power_off(running(args.name), args.node)
    return 0


def command_on(args: argparse.Namespace) -> int:
    """Switch it on again."""
    power_on(running(args.name), args.node)
    return 0


def command_down(args: argparse.Namespace) -> int:
    """Take down what `up` has made, and all that runs on its nodes; what `run` has started is its user's to end."""
    while known := found(args.name):
        cluster, keeper = known
        take_down(cluster.hosts, keeper)
        wait_until_removed(cluster)
    return 0


def command_with(args: argparse.Namespace) -> int:
    """Up, run, down, whatever happens."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    cluster, lifeline = made(args)
    try:
        line, env = line_of(cluster, args.command)
        with ended(subprocess.Popen(line, env=env)) as process:
            return process.wait()
    finally:
        os.close(lifeline)
        take_down(cluster.hosts, None)
        wait_until_removed(cluster)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; what follows `--` is the command to run."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="slurm.py", description="A Slurm cluster on one machine, as root.")
    commands = parser.add_subparsers(required=True, metavar="up | run | off | on | down | with")
    up = commands.add_parser("up", help="make a cluster of N nodes")
    run = commands.add_parser("run", help="run a command as on its login node: slurm.py run -- COMMAND; or a shell")
    off = commands.add_parser("off", help="cut a node's power")
    on = commands.add_parser("on", help="give it back; Slurm takes the node up again by itself")
    down = commands.add_parser("down", help="remove the cluster, and all that runs on its nodes")
    whole = commands.add_parser("with", help="up, run, down, whatever happens: slurm.py with N -- COMMAND")
    for each in (up, whole):
        each.add_argument("nodes", type=positive, metavar="N", help="number of nodes")
        each.add_argument("--cpus", type=positive, default=2, metavar="K", help="CPUs of a node, as Slurm sees it (2)")
        each.add_argument("--rate", default="1gbit", help="of each link in each direction, as tc writes it (1gbit)")
    for each in (up, run, off, on, down):
        name = os.environ.get("MPIDL_CLUSTER", "default")
        each.add_argument("--name", default=name, help="where several are up side by side (MPIDL_CLUSTER)")
    for each in (off, on):
        each.add_argument("node", help="such as host3")
    for name, each in {"up": up, "run": run, "off": off, "on": on, "down": down, "with": whole}.items():
        each.set_defaults(function=globals()[f"command_{name}"])
    args = parser.parse_args(argv[:cut])
    args.command = list(argv[cut + 1 :])
    if not args.command and args.function is command_with:
        parser.error("no command; write it behind --")
    return args


def main(argv: Sequence[str]) -> int:
    """Do what the command line says."""
    args = parse(argv)
    try:
        check_machine(TOOLS)
        return int(args.function(args))
    except HostsError as error:
        print(f"slurm.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
