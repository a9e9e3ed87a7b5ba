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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD, HEAD_ADDRESS, MAX_HOSTS = "head", "10.77.0.254", 253
SWITCH = "switch"
"""The bridge, and the head's network interface."""
SWITCH_MAC = "02:00:00:00:00:fe"
"""The bridge's own: else it takes the lowest of the hosts', and another one when that host goes, as no switch does."""
INTERFACE = "eth0"
"""Each host's network interface."""
TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "taskset": "util-linux",
         "mount": "mount", "hostname": "hostname"}  # fmt: skip
"""The commands that are needed, and their Debian packages."""
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
    """Of the processes that hold the namespaces: the head's, then the hosts'; 0 of a host that is switched off."""

    @property
    def names(self) -> list[str]:
        """The hosts' names, without the head's."""
        return [f"host{number}" for number in range(1, len(self.pids))]

    def pid_of(self, name: str) -> int:
        """The process that holds a host's namespaces."""
        if name not in self.names:
            raise HostsError(f"there is no {name}; there are {', '.join(self.names)}")
        return self.pids[1 + self.names.index(name)]


def check_machine(tools: Mapping[str, str] = TOOLS) -> None:
    """Raise unless this is a machine, and a user, that can have emulated hosts and has these commands."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise HostsError(
            'emulated hosts need Linux and root: sudo env "PATH=$PATH" hosts.py ...; where users may make namespaces, '
            "also: unshare --user --map-root-user hosts.py with ..."
        )
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        packages = " ".join(sorted({tools[tool] for tool in missing}))
        raise HostsError(f"no {', '.join(missing)} here; on Debian and Ubuntu: apt-get install {packages}")


def bring_up(num_hosts: int, rate: str) -> tuple[Hosts, int]:
    """Make the hosts and their links.

    Returns:
        The hosts, and the pipe's writing end: when all its copies are closed, the hosts are gone.
    """
    if not 1 <= num_hosts <= MAX_HOSTS:
        raise HostsError(f"{num_hosts} hosts; allowed are 1 to {MAX_HOSTS}")
    end, lifeline = os.pipe()
    hosts = [f"host{number}" for number in range(1, num_hosts + 1)]
    names, table = [HEAD, *hosts], table_of(hosts)
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


def table_of(hosts: Sequence[str]) -> str:
    """What becomes /etc/hosts everywhere."""
    return "\n".join(["127.0.0.1 localhost", *(f"{address(name)} {name}" for name in (HEAD, *hosts))])


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
    head, *hosts = pids
    configure(head, "ip", f"link add {SWITCH} address {SWITCH_MAC} type bridge")
    configure(head, "ip", f"address add {HEAD_ADDRESS}/24 dev {SWITCH}", f"link set {SWITCH} up")
    for number, pid in enumerate(hosts, start=1):
        link(head, f"host{number}", pid, rate)


def link(head: int, name: str, pid: int, rate: str) -> None:
    """Plug one host into the switch."""
    limit = f"root tbf rate {rate} burst 256kb latency 50ms"
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


def switch_off(hosts: Hosts, name: str) -> Hosts:
    """End a host and all that runs on it at once, as a power failure does; its number may be another process's then."""
    pid = hosts.pid_of(name)
    if not is_running(pid):
        raise HostsError(f"{name} is off")
    end = os.pidfd_open(pid)
    configure(hosts.pids[0], "ip", f"link delete {name}")  # with the host's end; the kernel would take its time over it
    os.kill(pid, signal.SIGKILL)
    wait_until_gone([end], hosts)
    return with_pid(hosts, name, 0)


def switch_on(hosts: Hosts, name: str) -> Hosts:
    """Start a host again that is off."""
    head = hosts.pids[0]
    if is_running(hosts.pid_of(name)):
        raise HostsError(f"{name} is on")
    end = os.open(f"/proc/{head}/fd/0", os.O_RDONLY)  # of the lifeline, as all holders have it
    holder = start_holder(name, table_of(hosts.names), end)
    os.close(end)
    wait_until_ready(holder)
    link(head, name, holder.pid, hosts.rate)
    return with_pid(hosts, name, holder.pid)


def with_pid(hosts: Hosts, name: str, pid: int) -> Hosts:
    """The same hosts, but that another process holds one of them, or none: 0."""
    pids = list(hosts.pids)
    pids[1 + hosts.names.index(name)] = pid
    return Hosts(hosts.rate, tuple(pids))


def is_running(pid: int) -> bool:
    """Whether there is a process, not 0, that has not ended, reaped or not."""
    if not pid:
        return False
    try:
        end = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    has_ended = bool(select.select([end], [], [], 0.0)[0])
    os.close(end)
    return not has_ended


def take_down(hosts: Hosts, holder: int | None) -> None:
    """Wait until the hosts are gone, whose lifeline is closed, or held by the process `holder`, which is ended."""
    ends = []
    for pid in filter(None, hosts.pids):
        with contextlib.suppress(ProcessLookupError):
            ends.append(os.pidfd_open(pid))
    if holder is not None:
        os.kill(holder, signal.SIGKILL)
    wait_until_gone(ends, hosts)


def wait_until_gone(ends: Sequence[int], hosts: Hosts) -> None:
    """Return when the processes behind these descriptors have ended; closes them."""
    deadline = time.monotonic() + GONE_S
    for end in ends:
        if not select.select([end], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise HostsError(f"hosts still there after {GONE_S:g} s; their processes: {hosts.pids}")
        os.close(end)


def keep(variable: str, record: Mapping[str, Any], lifeline: int) -> None:
    """Leave the lifeline to a process of its own, which has in its environment what `find` reads."""
    subprocess.Popen(
        ["sleep", "infinity"], env={"PATH": os.environ["PATH"], variable: json.dumps(record)}, pass_fds=[lifeline],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
    )  # fmt: skip


def find(variable: str, name: str) -> tuple[dict[str, Any], int] | None:
    """The record that was kept under this name, and its keeper."""
    mark = f"{variable}=".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for each in (entry / "environ").read_bytes().split(b"\0"):
                if each.startswith(mark):
                    record: dict[str, Any] = json.loads(each.removeprefix(mark))
                    if record["name"] == name:
                        return record, int(entry.name)
    return None
