"""A Slurm cluster of emulated hosts: what slurm.py brings up and takes down.

    head --------- where sbatch, srun and mpirun are typed, as on a login node
      +-- host1 .. hostN      the nodes, each with a slurmd
      +-- hostN+1             the controller: munged and slurmctld

Hosts are as namespaces.py makes them, with networks, host names, processes, /dev/shm and boot ids of their own: Slurm
and MPI see machines, and a node that is switched off is gone at once with all that ran on it. What nodes keep for
themselves (slurmd's spool) lies in their /dev/shm. What they share on a real cluster lies in one directory: the
configuration, munge's key and socket, logs, the controller's state. It is removed by a process that waits for the
lifeline's end, so that it goes with the hosts, however these end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from namespaces import TOOLS as TOOLS_OF_HOSTS
from namespaces import Hosts, HostsError, address, bring_up, switch_off, switch_on

TOOLS = {**TOOLS_OF_HOSTS, "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sinfo": "slurm-wlm", "munged": "munge"}
"""The commands that are needed, and their Debian packages."""
IDLE_S = 30.0
"""How long nodes may take to be ready."""
GONE_S = 10.0
"""How long the cluster's directory may take to be gone."""

# A requeued job waits until its old credential has expired, by default two minutes. The scheduler looks at once. A node
# that is silent for 20 s is down, and back when it answers. More cores may be declared than there are. PMIx's files
# must not be in a folder that nodes share.
CONFIGURATION = """\
ClusterName=local
SlurmctldHost={controller}({controller_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir=/dev/shm/slurmd
TmpFS=/dev/shm
SlurmctldPidFile=/dev/shm/slurmctld.pid
SlurmdPidFile=/dev/shm/slurmd.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
PriorityType=priority/basic
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=15
MinJobAge=3600
SlurmdTimeout=20
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes={first}-{last} Default=YES MaxTime=INFINITE State=UP
"""

JANITOR = 'cat; while ! rm -rf "$1"; do sleep 0.1; done'


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up."""

    directory: Path
    hosts: Hosts

    @property
    def nodes(self) -> list[str]:
        """The nodes' names."""
        return self.hosts.names[:-1]

    @property
    def configuration(self) -> Path:
        """What SLURM_CONF names."""
        return self.directory / "slurm.conf"

    def enter(self, name: str) -> list[str]:
        """The beginning of a command that is to run on a host."""
        pid = self.hosts.pid_of(name)
        return ["nsenter", "--target", str(pid), "--net", "--uts", "--mount", "--ipc",
                f"--pid=/proc/{pid}/ns/pid_for_children", "--wdns=/"]  # fmt: skip

    def enter_head(self) -> list[str]:
        """The same for where users type; in the current directory."""
        return ["nsenter", "--target", str(self.hosts.pids[0]), "--net", "--uts", "--mount", f"--wdns={os.getcwd()}"]

    def save(self) -> None:
        """Write down what `load` reads."""
        record = {"rate": self.hosts.rate, "pids": self.hosts.pids}
        fresh = self.directory / "cluster.new"
        fresh.write_text(json.dumps(record))
        fresh.replace(self.directory / "cluster.json")


def load(directory: Path) -> Cluster:
    """The cluster of this directory."""
    record = json.loads((directory / "cluster.json").read_text())
    return Cluster(directory, Hosts(record["rate"], tuple(record["pids"])))


def start(num_nodes: int, cpus: int, rate: str) -> tuple[Cluster, int]:
    """Bring a cluster up.

    Args:
        num_nodes: nodes.
        cpus: of each node, as Slurm is to believe.
        rate: of the nodes' links, as `tc` writes it.

    Returns:
        The cluster, and the pipe's writing end: when all its copies are closed, the cluster is gone.
    """
    hosts, lifeline = bring_up(num_nodes + 1, rate)
    try:
        directory = Path(tempfile.mkdtemp(prefix="mpidl-slurm-"))
        remove_at_end(directory, hosts)
        cluster = Cluster(directory, hosts)
        furnish(cluster, cpus)
        cluster.save()
        start_controller(cluster)
        for name in cluster.nodes:
            start_node(cluster, name)
        wait_until_idle(cluster, cluster.nodes)
    except BaseException:
        os.close(lifeline)
        raise
    return cluster, lifeline


def remove_at_end(directory: Path, hosts: Hosts) -> None:
    """Leave a process that removes the directory when the lifeline has ended."""
    with open(f"/proc/{hosts.pids[0]}/fd/0", "rb") as end:
        subprocess.Popen(
            ["sh", "-c", JANITOR, "sh", str(directory)], stdin=end, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
        )  # fmt: skip


def furnish(cluster: Cluster, cpus: int) -> None:
    """Write the configuration and the key."""
    directory, controller = cluster.directory, cluster.hosts.names[-1]
    directory.chmod(0o755)  # the socket's folder must be open to all
    for name in ("munge", "state", "log"):
        (directory / name).mkdir(mode=0o755)
    key = directory / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    nodes = [f"NodeName={name} NodeAddr={address(name)} CPUs={cpus} State=UNKNOWN" for name in cluster.nodes]
    text = CONFIGURATION.format(
        controller=controller, controller_address=address(controller), directory=directory, nodes="\n".join(nodes),
        first="host[1", last=f"{len(nodes)}]",
    )  # fmt: skip
    cluster.configuration.write_text(text)


def start_controller(cluster: Cluster) -> None:
    """Start munged and slurmctld."""
    munge, log = cluster.directory / "munge", cluster.directory / "log"
    files = [f"--key-file={munge}/key", f"--socket={munge}/socket", f"--seed-file={munge}/seed"]
    files += [f"--log-file={log}/munged.log", "--pid-file=/dev/shm/munged.pid"]
    enter = cluster.enter(cluster.hosts.names[-1])
    daemon(cluster, [*enter, "munged", "--force", "--num-threads=2", *files])
    daemon(cluster, [*enter, "slurmctld", "-c", "-f", str(cluster.configuration)])
    # A slurmd that is there before the controller tries again only after a second.
    wait_for("slurmctld", cluster, lambda: "UP" in asked(cluster, ["scontrol", "ping"]))


def start_node(cluster: Cluster, name: str) -> None:
    """Start a node's slurmd."""
    daemon(cluster, [*cluster.enter(name), "slurmd", "-N", name, "-f", str(cluster.configuration)])


def power_off(cluster: Cluster, name: str) -> None:
    """Switch a node off; Slurm has to find out by itself."""
    Cluster(cluster.directory, switch_off(cluster.hosts, node_named(cluster, name))).save()


def power_on(cluster: Cluster, name: str) -> None:
    """Switch it on again; Slurm takes it up by itself."""
    fresh = Cluster(cluster.directory, switch_on(cluster.hosts, node_named(cluster, name)))
    fresh.save()
    start_node(fresh, name)


def node_named(cluster: Cluster, name: str) -> str:
    """The name, if it is a node's."""
    if name not in cluster.nodes:
        raise HostsError(f"there is no node {name}; there are {', '.join(cluster.nodes)}")
    return name


def daemon(cluster: Cluster, command: Sequence[str]) -> None:
    """Start what goes to the background by itself."""
    log = cluster.directory / "log" / "start.log"
    with log.open("ab") as out:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment(cluster))
    if done.returncode:
        name = next(each for each in command if each in TOOLS and each not in TOOLS_OF_HOSTS)
        raise HostsError(f"{name} does not start: {last_line(log)}")


def wait_until_idle(cluster: Cluster, names: Sequence[str]) -> None:
    """Return when Slurm can start jobs on these nodes."""
    ask = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
    wait_for("nodes", cluster, lambda: set(names) <= set(asked(cluster, ask).split()))


def wait_for(what: str, cluster: Cluster, is_there: Callable[[], bool]) -> None:
    """Ask again and again, for a while."""
    deadline = time.monotonic() + IDLE_S
    while not is_there():
        if time.monotonic() > deadline:
            log = cluster.directory / "log" / "slurmctld.log"
            raise HostsError(f"{what} not ready after {IDLE_S:g} s; slurmctld says: {last_line(log)}")
        time.sleep(0.05)


def asked(cluster: Cluster, command: Sequence[str]) -> str:
    """What a Slurm command typed in the head answers."""
    line = [*cluster.enter_head(), *command]
    return subprocess.run(line, env=environment(cluster), capture_output=True, text=True).stdout


def environment(cluster: Cluster, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables without those of another Slurm, and with this one's."""
    kept = {name: value for name, value in given.items() if not name.startswith(("SLURM_JOB", "SLURM_STEP"))}
    return {**kept, "SLURM_CONF": str(cluster.configuration)}


def wait_until_removed(cluster: Cluster) -> None:
    """Return when the directory of a cluster whose lifeline has ended is gone."""
    deadline = time.monotonic() + GONE_S
    while cluster.directory.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    shutil.rmtree(cluster.directory, ignore_errors=True)


def last_line(log: Path) -> str:
    """The end of a log."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "nothing")
