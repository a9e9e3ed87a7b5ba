"""Judges the facts that `doctor` gathered: pure, so that every finding has a test with provoked facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

SHARED_MEMORY_WANTED = 1 << 30
"""Bytes: rows and weights of a 25 M-parameter model on 4 ranks need half of it."""

_NAMES = {"mpich": "MPICH", "openmpi": "Open MPI"}


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """What started this process, by its environment."""

    name: str
    family: Literal["mpich", "openmpi", "any", "unknown"]
    """The MPI that it can start; "any": no launcher, "unknown": srun without an MPI plugin."""
    size: int | None
    """Processes it started; None without a launcher."""


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """One rank's own facts."""

    hostname: str
    node: int
    cores: tuple[int, ...]
    """Numbers of the cores that the rank may run on."""
    num_machine_cores: int
    threads: int
    shared_memory_free: int | None
    """Bytes free in /dev/shm, None where there is none."""
    cache_dir: str
    """Folder of the compiled Numba kernels."""
    is_cache_writable: bool


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that was found out, over all ranks."""

    versions: Mapping[str, str | None]
    """Package -> version, None: not installed."""
    mpi_packages: tuple[str, ...]
    """Installed packages that bring an MPI library."""
    library: str | None
    """What the MPI library calls itself; None: it cannot be loaded."""
    library_error: str = ""
    mpirun: str | None
    """Path of the `mpirun` that a shell here finds."""
    mpirun_family: str | None
    launcher: Launcher
    thread_level: str | None
    """MPI's thread level; None: MPI was not started."""
    ranks: tuple[RankFacts, ...]
    """One per rank, in rank order; only this process's own where MPI was not started."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong and the line that mends it."""

    level: Literal["error", "warning"]
    what: str
    fix: str


def family_of(text: str) -> str | None:
    """Find out whether a library or an mpirun that calls itself so is "mpich" or "openmpi"; None: neither."""
    if "Open MPI" in text or "OpenRTE" in text:
        return "openmpi"
    if any(word in text for word in ("MPICH", "HYDRA", "Intel(R) MPI", "MVAPICH")):
        return "mpich"
    return None


def diagnose(facts: Facts) -> list[Finding]:
    """Everything that is wrong, errors first."""
    found = [*_of_software(facts), *_of_launch(facts), *_of_threads(facts)]
    for node in sorted({rank.node for rank in facts.ranks}):
        found += _of_node([rank for rank in facts.ranks if rank.node == node])
    return sorted(found, key=lambda finding: finding.level)


def _of_software(facts: Facts) -> Iterator[Finding]:
    for name, version in facts.versions.items():
        if version is None:
            yield Finding("error", f"{name} is not installed", f"pip install {name}")
    if len(facts.mpi_packages) > 1:
        yield Finding(
            "error",
            f"{' and '.join(facts.mpi_packages)} are both installed; each brings bin/mpirun, one of them is lost",
            "make a new environment with one of them: pip install mpidl[mpich]",
        )
    if facts.library is None and facts.versions.get("mpi4py"):
        yield Finding(
            "error",
            f"MPI cannot be loaded: {facts.library_error}",
            "pip install mpidl[mpich], or load the site's MPI module",
        )


def _of_launch(facts: Facts) -> Iterator[Finding]:
    """Do library, launcher and mpirun belong together, and does MPI see every process?"""
    if facts.library is None:
        return
    launcher, family = facts.launcher, family_of(facts.library)
    named = facts.library.split(",")[0]
    plugin = {"mpich": "pmi2", "openmpi": "pmix"}.get(family or "", "pmi2")
    fix = f"use the mpirun of {_NAMES.get(family or '', named)}, or srun --mpi={plugin}"
    if launcher.family in _NAMES and family in _NAMES and launcher.family != family:
        yield Finding("error", f"{launcher.name} cannot start {named}, the library that mpi4py loads", fix)
    elif launcher.family == "unknown" and (launcher.size or 1) > 1 and len(facts.ranks) != launcher.size:
        what = f"srun started {launcher.size} processes without an MPI plugin; each believes to be rank 0 of 1"
        yield Finding("error", what, f"srun --mpi={plugin}")
    elif launcher.size is not None and len(facts.ranks) != launcher.size:
        what = f"{launcher.name} started {launcher.size} processes, but MPI sees {len(facts.ranks)}"
        yield Finding("error", what, fix)
    elif facts.thread_level is None and facts.library_error:
        yield Finding("error", f"MPI does not start: {facts.library_error}", fix)
    if launcher.family == "any" and facts.mpirun is None:
        fix = "activate the environment (source .venv/bin/activate) or load the MPI module, unless you use srun"
        yield Finding("warning", "there is no mpirun in PATH", fix)
    if launcher.family == "any" and facts.mpirun_family in _NAMES and facts.mpirun_family != family:
        yield Finding(
            "error",
            f"{facts.mpirun} is {_NAMES[facts.mpirun_family]}'s, but mpi4py loads {named}",
            f"put {_NAMES.get(family or '', named)}'s bin folder first in PATH, or set MPI4PY_LIBMPI",
        )


def _of_threads(facts: Facts) -> Iterator[Finding]:
    if facts.thread_level == "single":
        yield Finding(
            "warning",
            "MPI runs at thread level single, but torch and the data loaders have threads",
            "export MPI4PY_RC_THREAD_LEVEL=funneled",
        )


def _of_node(ranks: list[RankFacts]) -> Iterator[Finding]:
    """Cores, shared memory and caches of one node's ranks."""
    yield from _of_cores(ranks)
    host, free = ranks[0].hostname, ranks[0].shared_memory_free
    if free is None or free < SHARED_MEMORY_WANTED:
        had = "no /dev/shm" if free is None else f"only {free >> 20} MiB free in /dev/shm"
        yield Finding(
            "warning",
            f"{host} has {had}; large models fall back to private memory: more of it, and slower",
            "docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm",
        )
    if not all(rank.is_cache_writable for rank in ranks):
        unwritable = next(rank.cache_dir for rank in ranks if not rank.is_cache_writable)
        yield Finding(
            "error",
            f"{host} cannot write compiled kernels to {unwritable}",
            "export NUMBA_CACHE_DIR=FOLDER with a folder that you can write to",
        )


def _of_cores(ranks: list[RankFacts]) -> Iterator[Finding]:
    host, num_ranks = ranks[0].hostname, len(ranks)
    num_cores = len({core for rank in ranks for core in rank.cores})
    num_threads = sum(rank.threads for rank in ranks)
    if num_ranks > 1 and num_cores == 1 and ranks[0].num_machine_cores > 1:
        yield Finding(
            "error",
            f"all {num_ranks} ranks of {host} are bound to one of its {ranks[0].num_machine_cores} cores",
            "mpirun --bind-to none (Open MPI), mpirun -bind-to core (MPICH), srun --cpu-bind=cores",
        )
    elif num_ranks > num_cores:
        yield Finding(
            "warning",
            f"{num_ranks} ranks share the {num_cores} cores of {host}; correct, but slower than a core each",
            f"start at most {num_cores} ranks there",
        )
    elif num_threads > num_cores:
        yield Finding(
            "warning",
            f"{num_threads} threads of {num_ranks} ranks share the {num_cores} cores of {host}",
            f"export OMP_NUM_THREADS={max(1, num_cores // num_ranks)}, or --threads-per-rank",
        )
