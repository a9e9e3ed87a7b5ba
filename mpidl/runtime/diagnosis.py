"""What can be wrong with the ranks of a job: versions, cores, and the folder that they share.

Pure, so that every finding has a test with provoked facts. `startup.init` judges the ranks with it before the first
iteration, and `mpidl doctor` shows the same findings: there is no second opinion. A finding that `stops` keeps a
training from starting, any other error is told as a warning there.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mpidl._version import __version__
from mpidl.runtime.slurm import Slurm, ignored_cpus, one_core_for_all
from mpidl.runtime.threads import asked_threads, crowd, own_cores

PACKAGES = ("numpy", "numba", "torch", "mpi4py", "safetensors")
"""Those whose versions have to be the same on all ranks."""
_SPINNING = {"OMP_WAIT_POLICY": "active", "KMP_BLOCKTIME": "infinite", "GOMP_SPINCOUNT": "infinite"}
"""Settings that let a thread that waits keep its core."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong and the line that mends it."""

    level: Literal["error", "warning"]
    what: str
    fix: str
    stops: bool = False
    """Whether a training does not start."""

    def __str__(self) -> str:
        return f"{'problem' if self.level == 'error' else 'warning'}: {self.what}\n    fix: {self.fix}"


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """One rank's own facts; cheap to gather."""

    hostname: str
    node: int
    cores: tuple[int, ...]
    """Numbers of the cores that the rank may run on."""
    num_machine_cores: int
    threads: int
    asked_threads: int | None = None
    """What the user has given for a rank."""
    cpus_per_task: int | None = None
    """What the Slurm job asked for; None: nothing, or no Slurm."""
    cpus_on_node: int | None = None
    """What the Slurm job has on this node."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """Package, python or MPI library -> version, None: not installed."""
    spinning: str | None = None
    """A setting, NAME=value, that lets waiting threads keep their cores."""


def own_facts(node: int, threads: int, threads_per_rank: int | None, library: str | None) -> RankFacts:
    """This rank's.

    Args:
        node: its node.
        threads: that it will have.
        threads_per_rank: what the user has given; None: OMP_NUM_THREADS or nothing.
        library: what its MPI library calls itself, None: it cannot be loaded.
    """
    slurm = Slurm.from_environment()
    settings = (
        f"{name}={os.environ[name]}" for name in _SPINNING if os.environ.get(name, "").lower() == _SPINNING[name]
    )
    return RankFacts(
        hostname=platform.node(),
        node=node,
        cores=tuple(own_cores()),
        num_machine_cores=os.cpu_count() or 1,
        threads=threads,
        asked_threads=threads_per_rank or asked_threads(),
        cpus_per_task=None if slurm is None else slurm.cpus_per_task,
        cpus_on_node=None if slurm is None else slurm.cpus_on_node,
        versions=own_versions() | {"MPI library": library},
        spinning=next(settings, None),
    )


def own_versions() -> dict[str, str | None]:
    """Of mpidl, Python and the packages that mpidl computes with."""
    return {
        "mpidl": __version__,
        "python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
    }


def version_of(package: str) -> str | None:
    """An installed package's version; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def of_ranks(ranks: Sequence[RankFacts]) -> list[Finding]:
    """All that is wrong with a job's ranks.

    Args:
        ranks: one entry a rank, in rank order.
    """
    hosts = sorted({rank.hostname for rank in ranks})
    of_host = {host: {number: rank for number, rank in enumerate(ranks) if rank.hostname == host} for host in hosts}
    return [*of_versions(ranks), *merged({host: list(of_cores(there)) for host, there in of_host.items()})]


def merged(findings: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Tell what is wrong on many hosts once.

    Args:
        findings: host -> what is wrong there; the texts begin with the host's name and a colon.
    """
    hosts: dict[Finding, list[str]] = {}
    for host, found in findings.items():
        for finding in found:
            hosts.setdefault(replace(finding, what=finding.what.removeprefix(f"{host}: ")), []).append(host)
    return [replace(finding, what=f"{_listed(names)}: {finding.what}") for finding, names in hosts.items()]


def of_versions(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Do all ranks run the same software? Of Python the first two numbers count."""
    first = ranks[0]
    for name in first.versions:
        differs = [rank for rank in ranks if _shown(name, rank) != _shown(name, first)]
        if differs:
            number, other = ranks.index(differs[0]), differs[0]
            yield Finding(
                "error",
                f"{name} is {other.versions.get(name) or 'missing'} on rank {number} ({other.hostname}), but "
                f"{first.versions[name] or 'missing'} on rank 0 ({first.hostname})",
                "give all ranks one environment: activate it in the job script, in a folder that all nodes share",
                stops=True,
            )


def _shown(name: str, rank: RankFacts) -> str | None:
    version = rank.versions.get(name)
    return ".".join(version.split(".")[:2]) if name == "python" and version else version


def of_cores(ranks: Mapping[int, RankFacts]) -> Iterator[Finding]:
    """Has every rank of a machine the cores that it needs?

    Args:
        ranks: those of one machine, by their numbers.
    """
    facts = list(ranks.values())
    host, num_machine_cores = facts[0].hostname, facts[0].num_machine_cores
    cores = {core for rank in facts for core in rank.cores}
    num_threads = sum(rank.threads for rank in facts)
    crowded = crowd([rank.cores for rank in facts])
    if lack := _lack_of_slurm(facts):
        yield Finding("error", f"{host}: {lack[0]}", lack[1], stops=True)
    elif len(facts) > 1 and len(cores) == 1 and num_machine_cores > 1:
        what = f"{host}: all {len(facts)} ranks are bound to one of {num_machine_cores} cores"
        yield Finding(
            "error", what, "mpirun --bind-to none (Open MPI), mpirun -bind-to core (MPICH), srun --cpu-bind=cores"
        )
    elif crowded is not None and len(crowded[1]) < len(cores):
        numbers = [list(ranks)[position] for position in crowded[0]]
        yield Finding(
            "error",
            f"{host}: ranks {_listed(numbers)} are bound to {_cores_text(crowded[1])}, while all ranks there have "
            f"{len(cores)} cores together",
            "bind each rank to cores of its own: mpirun --bind-to core, srun --cpu-bind=cores; or bind none",
        )
    elif crowded is not None:
        yield Finding(
            "warning",
            f"{host}: {len(facts)} ranks share {len(cores)} cores; correct, but slower than a core each",
            f"start at most {len(cores)} ranks there (mpidl waits without spinning; MPI calls of your own spin)",
        )
    elif num_threads > len(cores):
        yield Finding(
            "warning",
            f"{host}: {num_threads} threads of {len(facts)} ranks share {len(cores)} cores",
            f"export OMP_NUM_THREADS={max(1, len(cores) // len(facts))}, or --threads-per-rank",
        )
    spinning = next((rank.spinning for rank in facts if rank.spinning), None)
    if spinning and (crowded is not None or num_threads > len(cores)):
        yield Finding(
            "warning",
            f"{host}: {spinning} lets waiting threads spin on cores that others need",
            f"unset {spinning.partition('=')[0]}",
        )


def _lack_of_slurm(ranks: Sequence[RankFacts]) -> tuple[str, str] | None:
    """What is wrong with the cores that Slurm or its launcher gave; None: nothing.

    Whoever gives a number of threads that has room on the rank's cores knows what he does.
    """
    cores = {core for rank in ranks for core in rank.cores}
    if found := one_core_for_all(ranks[0].cpus_on_node, len(ranks), len(cores)):
        return found
    lacking = (
        ignored_cpus(rank.cpus_per_task, len(rank.cores), rank.num_machine_cores)
        for rank in ranks
        if rank.asked_threads is None or rank.asked_threads > len(rank.cores)
    )
    return next(filter(None, lacking), None)


def of_folder(folder: str, reason: str, hosts_without: Sequence[str], limit_s: float) -> Finding | None:
    """Is a folder one and the same on all nodes?

    Args:
        folder: where rank 0 wrote a file.
        reason: why it could not; "" where it could.
        hosts_without: those that have not seen the file.
        limit_s: for how long they looked.
    """
    if reason:
        return Finding("error", reason, "give a folder that you can write to: --run-dir FOLDER", stops=True)
    if not hosts_without:
        return None
    names = _listed(sorted(set(hosts_without)))
    return Finding(
        "error",
        f"{names} did not see, within {limit_s:g} s, a file that rank 0 wrote to {folder}: it is not shared",
        "give a folder that all nodes share (your home, the cluster's scratch): --run-dir FOLDER",
        stops=True,
    )


def _listed(names: Sequence[object]) -> str:
    """In words; of many the first."""
    texts = [str(name) for name in names]
    if len(texts) > 4:
        texts = [*texts[:3], f"{len(texts) - 3} more"]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _cores_text(cores: Sequence[int]) -> str:
    return f"core {cores[0]}" if len(cores) == 1 else f"cores {_listed(cores)}"
