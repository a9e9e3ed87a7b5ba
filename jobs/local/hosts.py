#!/usr/bin/env python3
"""Several hosts on one machine, for tests and benchmarks: MPI between them goes over TCP, at the rate you give.

    sudo env "PATH=$PATH" jobs/local/hosts.py with 4 --rate 400mbit -- mpidl train jobs/digits.toml

or step by step: `hosts.py up 4`, `hosts.py run -- COMMAND` as often as you like, `hosts.py down`.

Ranks on two hosts share no memory. Files are those of the machine, as on a cluster with a shared file system, but for
temporary ones. mpirun runs in the head and enters the hosts by enter.sh, where a cluster has ssh. What the hosts are
made of is in namespaces.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from namespaces import INTERFACE, SWITCH, Hosts, HostsError, bring_up, check_machine, find, keep, take_down

PREFERRED = {
    # libfabric's tcp is about twice as fast here as UCX's.
    "MPIR_CVAR_CH4_NETMOD": "ofi",
    "FI_PROVIDER": "tcp",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_mpi_yield_when_idle": "1",  # hosts may share cores, which Open MPI does not see
}
"""Variables for mpirun and ranks, unless you have set them."""

REQUIRED = {
    "HYDRA_IFACE": SWITCH,
    "FI_TCP_IFACE": INTERFACE,
    "OMPI_MCA_btl_tcp_if_include": INTERFACE,
    "GLOO_SOCKET_IFNAME": INTERFACE,
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
"""Variables in any case: no other interfaces are there, and the user is root."""

KEEPER = "MPIDL_HOSTS_KEEPER"
"""The variable in which whoever holds the lifeline of hosts that stay up has their record."""

ENDING_S = 10.0
"""How long ranks may take to end when they are asked to."""


def spread(num_hosts: int, num_ranks: int | None, per_host: int | None) -> list[int]:
    """How many ranks each host gets: one, or `per_host`, or `num_ranks` as evenly as they go."""
    ranks = num_ranks or num_hosts * (per_host or 1)
    if per_host and ranks > num_hosts * per_host:
        raise HostsError(f"{ranks} ranks do not fit on {num_hosts} hosts with {per_host} each; lower -n")
    if per_host:
        return [max(0, min(per_host, ranks - host * per_host)) for host in range(num_hosts)]
    return [ranks // num_hosts + (host < ranks % num_hosts) for host in range(num_hosts)]


def share_cores(num_hosts: int, cores: Sequence[int]) -> list[list[int]]:
    """Each host's cores: a share of its own where there are enough, else one of them in turn."""
    if num_hosts > len(cores):
        return [[cores[host % len(cores)]] for host in range(num_hosts)]
    cuts = [host * len(cores) // num_hosts for host in range(num_hosts + 1)]
    return [list(cores[begin:end]) for begin, end in itertools.pairwise(cuts)]


def mpirun_line(hosts: Hosts, args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The command that runs mpirun in the head, and its environment."""
    names = args.on.split(",") if args.on else hosts.names
    counts = spread(len(names), args.n, args.per_host)
    cores = sorted(os.sched_getaffinity(0))
    shares = share_cores(len(names), cores) if args.cores == "share" else [cores] * len(names)
    places = zip(names, map(hosts.pid_of, names), shares, strict=True)
    entries = [f"{name}:{pid}:{','.join(map(str, share))}" for name, pid, share in places]
    env = PREFERRED | os.environ | REQUIRED | {"EMULATED_HOSTS": " ".join(entries)}
    if sys.prefix != sys.base_prefix:  # this Python's virtual environment, activated or not
        env["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), env["PATH"]])
    mpirun = shutil.which("mpirun", path=env["PATH"])
    if mpirun is None:
        raise HostsError("no mpirun in PATH; activate an environment that has one: pip install mpich")
    is_open_mpi = "Open MPI" in subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout
    where = ",".join(f"{name}:{count}" for name, count in zip(names, counts, strict=True) if count)
    options = (open_mpi if is_open_mpi else mpich)(where, str(Path(__file__).resolve().with_name("enter.sh")))
    inside = ["nsenter", "--target", str(hosts.pids[0]), "--net", "--uts", "--mount", f"--wdns={os.getcwd()}"]
    return [*inside, mpirun, *options, *shlex.split(args.mpirun), "-n", str(sum(counts)), *args.command], env


def mpich(where: str, agent: str) -> list[str]:
    """Hydra's options."""
    return ["-launcher", "ssh", "-launcher-exec", agent, "-hosts", where]


def open_mpi(where: str, agent: str) -> list[str]:
    """Open MPI's options; left alone, it would bind ranks to the machine's first cores on every host."""
    return ["--prtemca", "plm_ssh_agent", agent, "--host", where, "--bind-to", "none"]


def find_hosts(name: str) -> tuple[Hosts, int] | None:
    """The hosts that `up` has made under this name, and their keeper."""
    if (found := find(KEEPER, name)) is None:
        return None
    record, keeper = found
    return Hosts(record["rate"], tuple(record["pids"])), keeper


def command_up(args: argparse.Namespace) -> int:
    """Bring hosts up and leave them."""
    if found := find_hosts(args.name):
        there = f"{len(found[0].names)} hosts named {args.name} are up already, at {found[0].rate}"
        raise HostsError(f"{there}; first: hosts.py down --name {args.name}")
    hosts, lifeline = bring_up(args.hosts, args.rate)
    keep(KEEPER, {"name": args.name, "rate": hosts.rate, "pids": hosts.pids}, lifeline)
    print(f"{', '.join(hosts.names)} at {args.rate}")
    return 0


def command_run(args: argparse.Namespace) -> NoReturn:
    """Become mpirun."""
    found = find_hosts(args.name)
    if not found:
        raise HostsError(f"no hosts named {args.name} are up; first: hosts.py up 2 --name {args.name}")
    line, env = mpirun_line(found[0], args)
    os.execvpe(line[0], line, env)


def command_down(args: argparse.Namespace) -> int:
    """Take down what `up` has made, and all that runs there."""
    while found := find_hosts(args.name):
        take_down(*found)
    return 0


def command_with(args: argparse.Namespace) -> int:
    """Up, run, down, whatever happens."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    hosts, lifeline = bring_up(args.hosts, args.rate)
    try:
        line, env = mpirun_line(hosts, args)
        with ended(subprocess.Popen(line, env=env)) as mpirun:
            return mpirun.wait()
    finally:
        os.close(lifeline)
        take_down(hosts, None)


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """A process that is asked to end, then made to, when the block ends before it."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            process.kill()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; what follows `--` is the command to run on the hosts."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="hosts.py", description="Several hosts on one machine, as root.")
    commands = parser.add_subparsers(required=True, metavar="up | run | down | with")
    up = commands.add_parser("up", help="make N hosts")
    run = commands.add_parser("run", help="run a command on them with mpirun: hosts.py run [-n RANKS] -- COMMAND")
    down = commands.add_parser("down", help="remove them, and all that runs there")
    whole = commands.add_parser("with", help="up, run, down, whatever happens: hosts.py with N -- COMMAND")
    for each in (up, whole):
        each.add_argument("hosts", type=int, metavar="N", help="number of hosts")
        each.add_argument("--rate", default="1gbit", help="of each link in each direction, as tc writes it (1gbit)")
    for each in (up, run, down):
        each.add_argument("--name", default="default", help="where several are up side by side")
    for each in (run, whole):
        each.add_argument("-n", type=positive, metavar="RANKS", help="ranks in all, spread evenly (one per host)")
        each.add_argument("--per-host", type=positive, metavar="K", help="fill each host with K ranks before the next")
        each.add_argument("--on", metavar="HOSTS", help="only on these, such as host1,host3 (all)")
        each.add_argument(
            "--cores", choices=["share", "all"], default="share",
            help="share: each host has its share of the cores, or one in turn where hosts are more; all: no binding",
        )  # fmt: skip
        each.add_argument("--mpirun", default="", help="more options of mpirun, such as --mpirun='--with-ft ulfm'")
    for name, each in {"up": up, "run": run, "down": down, "with": whole}.items():
        each.set_defaults(function=globals()[f"command_{name}"])
    args = parser.parse_args(argv[:cut])
    args.command = list(argv[cut + 1 :])
    if not args.command and args.function in (command_run, command_with):
        parser.error("no command; write it behind --")
    return args


def positive(text: str) -> int:
    """A number of hosts or ranks."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return int(text)


def main(argv: Sequence[str]) -> int:
    """Do what the command line says."""
    args = parse(argv)
    try:
        check_machine()
        return int(args.function(args))
    except HostsError as error:
        print(f"hosts.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
