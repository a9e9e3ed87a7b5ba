"""Hosts made of Linux namespaces, joined by a bridge, with limited links: what hosts.py brings up and takes down.

A host is a network, a host name, processes, /dev/shm and a boot id (by which MPI libraries tell machines apart) of its
own. Each has one link to the switch, a bridge in the namespaces of the head:

    head, 10.77.0.254 -- switch --+-- host1, 10.77.0.1
                                  +-- host2, 10.77.0.2    ... `tc tbf` limits each link in both directions

Nothing of this has a name or a file outside: namespaces live as long as their processes, and these end when the last
copy of one pipe's writing end, the lifeline, is closed, however its holder ends. So nothing can be left behind, and
hosts made side by side never meet.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HEAD, HEAD_ADDRESS, MAX_HOSTS = "head", "10.77.0.254", 253
SWITCH = "switch"
"""The bridge, and the head's network interface."""
INTERFACE = "eth0"
"""Each host's network interface."""
TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "taskset": "util-linux",
         "mount": "mount", "hostname": "hostname"}  # fmt: skip
"""The commands that are needed, and their Debian packages."""
KEEPER_VARIABLE = "MPIDL_HOSTS_KEEPER"
GONE_S = 10.0
"""How long namespaces may take to be gone."""

# What runs in new namespaces, as the first process of a host: make it a host, say so, live as long as the pipe.
FURNISH = """
set -e
mount -t tmpfs tmpfs /dev/shm
cat /proc/sys/kernel/random/uuid >/dev/shm/boot_id
printf '%s\n' "$2" >/dev/shm/hosts
mount --bind /dev/shm/boot_id /proc/sys/kernel/random/boot_id
mount --bind /dev/shm/hosts /etc/hosts
rm /dev/shm/boot_id /dev/shm/hosts
hostname "$1"
ip link set lo up
echo ready
exec cat >/dev/null 2>&1
"""


class HostsError(Exception):
    """What the user has to know, in one line."""


@dataclass(frozen=True)
class Hosts:
    """Hosts that are up."""

    rate: str
    """Of each link, as `tc` writes it."""
    pids: tuple[int, ...]
    """Of the processes that hold the namespaces: the head's, then the hosts'."""

    @property
    def names(self) -> list[str]:
        """The hosts' names, without the head's."""
        return [f"host{number}" for number in range(1, len(self.pids))]


def check_machine() -> None:
    """Raise unless this is a machine, and a user, that can have emulated hosts."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise HostsError(
            'emulated hosts need Linux and root: sudo env "PATH=$PATH" hosts.py ...; where users may make namespaces, '
            "also: unshare --user --map-root-user hosts.py with ..."
        )
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        packages = " ".join(sorted({TOOLS[tool] for tool in missing}))
        raise HostsError(f"no {', '.join(missing)} here; on Debian and Ubuntu: apt-get install {packages}")


def bring_up(num_hosts: int, rate: str) -> tuple[Hosts, int]:
    """Make the hosts and their links.

    Returns:
        The hosts, and the pipe's writing end: when all its copies are closed, the hosts are gone.
    """
    if not 1 <= num_hosts <= MAX_HOSTS:
        raise HostsError(f"{num_hosts} hosts; allowed are 1 to {MAX_HOSTS}")
    end, lifeline = os.pipe()
    names = [HEAD, *(f"host{number}" for number in range(1, num_hosts + 1))]
    table = "\n".join(["127.0.0.1 localhost", *(f"{address(name)} {name}" for name in names)])
    try:
        holders = [start_holder(name, table, end) for name in names]
        os.close(end)
        for holder in holders:
            wait_until_ready(holder)
        connect([holder.pid for holder in holders], rate)
    except BaseException:
        os.close(lifeline)
        raise
    return Hosts(rate, tuple(holder.pid for holder in holders)), lifeline


def address(name: str) -> str:
    """The head's or a host's address."""
    return HEAD_ADDRESS if name == HEAD else f"10.77.0.{name.removeprefix('host')}"


def start_holder(name: str, table: str, end: int) -> subprocess.Popen[str]:
    """Start the process that holds a host's namespaces; `table` becomes its /etc/hosts."""
    # mpirun runs in the head's, and ends by itself; a host's end has to end all that runs on it.
    processes = [] if name == HEAD else ["--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", *processes, "sh", "-c", FURNISH, "sh", name, table],
        stdin=end, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_until_ready(holder: subprocess.Popen[str]) -> None:
    """Return when a host has said that it is there."""
    assert holder.stdout is not None
    if holder.stdout.readline() != "ready\n":
        reason = " ".join(holder.communicate()[1].split())
        raise HostsError(
            f"this machine does not let namespaces be made ({reason}); in a container, start that with --privileged"
        )


def connect(pids: Sequence[int], rate: str) -> None:
    """Join the hosts by a switch, with limited links."""
    limit = f"root tbf rate {rate} burst 256kb latency 50ms"
    head, *hosts = pids
    configure(head, "ip", f"link add {SWITCH} type bridge", f"address add {HEAD_ADDRESS}/24 dev {SWITCH}")
    configure(head, "ip", f"link set {SWITCH} up")
    for number, pid in enumerate(hosts, start=1):
        name = f"host{number}"
        configure(head, "ip", f"link add {name} type veth peer name {INTERFACE} netns {pid}")
        configure(head, "ip", f"link set {name} master {SWITCH} up")
        configure(pid, "ip", f"address add {address(name)}/24 dev {INTERFACE}", f"link set {INTERFACE} up")
        configure(head, "tc", f"qdisc add dev {name} {limit}")
        configure(pid, "tc", f"qdisc add dev {INTERFACE} {limit}")


def configure(pid: int, tool: str, *lines: str) -> None:
    """Give commands to `ip` or `tc` in a host's network."""
    command = ["nsenter", "--target", str(pid), "--net", tool, "-batch", "-"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", text=True, capture_output=True)
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())
        raise HostsError(f"{tool} does not take `{'; '.join(lines)}`: {reason}")


def take_down(hosts: Hosts, holder: int | None) -> None:
    """Wait until the hosts are gone, whose lifeline is closed, or held by the process `holder`, which is ended."""
    ends = []
    for pid in hosts.pids:
        with contextlib.suppress(ProcessLookupError):
            ends.append(os.pidfd_open(pid))
    if holder is not None:
        os.kill(holder, signal.SIGKILL)
    deadline = time.monotonic() + GONE_S
    for end in ends:
        if not select.select([end], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise HostsError(f"hosts still there after {GONE_S:g} s; their processes: {hosts.pids}")
        os.close(end)


def keep(hosts: Hosts, name: str, lifeline: int) -> None:
    """Leave the lifeline to a process of its own, which has in its environment what `find` reads."""
    record = json.dumps({"name": name, "rate": hosts.rate, "pids": hosts.pids})
    subprocess.Popen(
        ["sleep", "infinity"], env={"PATH": os.environ["PATH"], KEEPER_VARIABLE: record}, pass_fds=[lifeline],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
    )  # fmt: skip


def find(name: str) -> tuple[Hosts, int] | None:
    """The hosts that `up` has made under this name, and their keeper."""
    mark = f"{KEEPER_VARIABLE}=".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for variable in (entry / "environ").read_bytes().split(b"\0"):
                if variable.startswith(mark):
                    record = json.loads(variable.removeprefix(mark))
                    if record["name"] == name:
                        return Hosts(record["rate"], tuple(record["pids"])), int(entry.name)
    return None
