"""Judges what `examination` found: pure, so that every finding has a test with provoked facts.

What is wrong with the ranks themselves (versions, cores, the shared folder) is `runtime.diagnosis`', which trainings
ask too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mpidl.doctor.facts import Facts, Link, Network, Surroundings
from mpidl.doctor.software import PLUGINS, family_of
from mpidl.runtime.diagnosis import Finding, merged, of_folder, of_ranks
from mpidl.runtime.launcher import two_libraries
from mpidl.runtime.shared_folder import LIMIT_S

SHARED_MEMORY_WANTED = 1 << 30
"""Bytes: rows and weights of a 25 M-parameter model on 4 ranks need half of it."""
_LINK_SHARE, _MEMORY_SHARE = 0.5, 0.5
"""The least parts of a link's rate, and of a copy in memory, that messages should reach."""
_NAMES = {"mpich": "MPICH", "openmpi": "Open MPI"}


def diagnose(facts: Facts) -> list[Finding]:
    """Everything that is wrong, errors first."""
    surroundings = list(facts.ranks.values())
    found = [*_of_software(facts), *_of_launch(facts), *_of_answers(facts), *_of_threads(facts)]
    found += of_ranks([each.rank for each in surroundings])
    without = [each.rank.hostname for each in surroundings if each.folder_s is None]
    if finding := of_folder(facts.folder, facts.folder_reason, without, LIMIT_S):
        found.append(finding)
    hosts = sorted({each.rank.hostname for each in surroundings})
    found += merged({host: list(_of_host(host, surroundings)) for host in hosts})
    found += _of_links(facts)
    return sorted(found, key=lambda finding: finding.level)


def _of_software(facts: Facts) -> Iterator[Finding]:
    for name, version in facts.versions.items():
        if version is None:
            yield Finding("error", f"{name} is not installed", f"pip install {name}")
    if found := two_libraries(facts.mpi_packages):
        yield Finding("error", *found)
    if facts.library is None and facts.versions.get("mpi4py"):
        yield Finding(
            "error",
            f"MPI cannot be loaded: {facts.library_error}",
            "pip install mpich, or load the site's MPI module",
        )


def _of_launch(facts: Facts) -> Iterator[Finding]:
    """Do library, launcher and mpirun belong together, and does MPI see every process?"""
    if facts.library is None or two_libraries(facts.mpi_packages):
        return
    launcher, family = facts.launcher, family_of(facts.library)
    named = facts.library.split(",")[0]
    plugin = PLUGINS.get(family or "", "pmi2")
    fix = f"use the mpirun of {_NAMES.get(family or '', named)}, or srun --mpi={plugin}"
    if launcher.family in _NAMES and family in _NAMES and launcher.family != family:
        yield Finding("error", f"{launcher.name} cannot start {named}, the library that mpi4py loads", fix)
    elif launcher.family == "unknown" and (launcher.size or 1) > 1 and facts.num_ranks != launcher.size:
        what = f"srun started {launcher.size} processes without an MPI plugin; each believes to be rank 0 of 1"
        yield Finding("error", what, f"srun --mpi={plugin}")
    elif launcher.size is not None and facts.num_ranks != launcher.size:
        what = f"{launcher.name} started {launcher.size} processes, but MPI sees {facts.num_ranks}"
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


def _of_answers(facts: Facts) -> Iterator[Finding]:
    if facts.silent:
        fix = "look at that host's load and file systems; if it is sound, see that the nodes reach each other's ports"
        yield Finding("error", facts.silent, fix)


def _of_threads(facts: Facts) -> Iterator[Finding]:
    if facts.thread_level == "single":
        yield Finding(
            "warning",
            "MPI runs at thread level single, but torch and the data loaders have threads",
            "export MPI4PY_RC_THREAD_LEVEL=funneled",
        )
    elif (
        facts.thread_level in ("funneled", "serialized") and len({each.rank.node for each in facts.ranks.values()}) > 1
    ):
        yield Finding(
            "warning",
            f"MPI runs at thread level {facts.thread_level}: nothing travels between nodes while a rank computes",
            "unset MPI4PY_RC_THREAD_LEVEL; if MPI itself gives no more, load another build of it",
        )


def _of_host(host: str, surroundings: list[Surroundings]) -> Iterator[Finding]:
    """Shared memory, caches and loaders of one host's ranks."""
    ranks = [each for each in surroundings if each.rank.hostname == host]
    folder, free = ranks[0].shared_memory_dir, ranks[0].shared_memory_free
    if free is None or free < SHARED_MEMORY_WANTED:
        had = f"no {folder}" if free is None else f"only {free >> 20} MiB free in {folder}"
        yield Finding(
            "warning",
            f"{host}: {had}; large models fall back to private memory: more of it, and slower",
            f"docker run --shm-size=8g, or mount -o remount,size=8g {folder}",
        )
    unwritable = next((each.cache_dir for each in ranks if not each.is_cache_writable), None)
    if unwritable is not None:
        yield Finding(
            "error",
            f"{host}: compiled kernels cannot be written to {unwritable}",
            "export NUMBA_CACHE_DIR=FOLDER with a folder that you can write to",
        )
    fabric = next((each for each in ranks[0].networks if each.kind == "fabric"), None)
    if fabric is not None and any(each.forks for each in ranks):
        yield Finding(
            "warning",
            f"{host}: torch's DataLoader forks its workers; with {fabric.name} that may crash them or spoil messages",
            "export RDMAV_FORK_SAFE=1, or leave loading to mpidl (loader_workers), which does not fork",
        )


def _of_links(facts: Facts) -> list[Finding]:
    """What is wrong with links; of many alike the slowest is named."""
    alike: dict[str, list[Finding]] = {}
    for link in sorted(facts.links, key=lambda link: link.bytes_per_s):
        for finding in _of_link(facts, link):
            alike.setdefault(finding.fix, []).append(finding)
    return [
        replace(found[0], what=f"{found[0].what}; and so {len(found) - 1} more links") if len(found) > 1 else found[0]
        for found in alike.values()
    ]


def _of_link(facts: Facts, link: Link) -> Iterator[Finding]:
    """Is a link as fast as what it is made of?"""
    one, other = (facts.ranks[rank] for rank in link.ranks)
    unset = _unset({*one.network_settings, *other.network_settings}, family_of(facts.library or ""))
    names = f"{one.rank.hostname} and {other.rank.hostname}"
    if link.is_inside:
        if link.device is not None and link.bytes_per_s < _MEMORY_SHARE * link.copy_bytes_per_s:
            yield Finding(
                "warning",
                f"messages between ranks of {one.rank.hostname} go by the network ({link.device}, "
                f"{_rate(link.bytes_per_s)}; a copy in memory {_rate(link.copy_bytes_per_s)})",
                unset or "look for settings of MPI in your modules and scripts: env | grep -e MCA -e CVAR",
            )
        return
    fabric, device = _fastest(one, other, "fabric"), link.device
    if fabric is not None and device is not None:
        yield Finding(
            "warning",
            f"MPI sends by TCP between {names} ({device}, {_rate(link.bytes_per_s)}); both have {_described(fabric)}",
            unset or "use the site's MPI, which is built for it (module load ...), instead of pip's",
        )
        return
    expected = fabric or next((network for network in one.networks if network.name == device), None)
    if expected is not None and expected.gbit and link.bytes_per_s < _LINK_SHARE * expected.gbit * 1e9 / 8:
        yield Finding(
            "warning",
            f"messages between {names} move {_rate(link.bytes_per_s)}, but {_described(expected)} allows "
            f"{_rate(expected.gbit * 1e9 / 8)}",
            (fabric and unset)
            or "see whether the link is in use or negotiated slower (ethtool), and whether cores are shared",
        )


def _fastest(one: Surroundings, other: Surroundings, kind: str) -> Network | None:
    """The slower one of the fastest networks of this kind at both ends."""
    best = [
        max(
            (network for network in end.networks if network.kind == kind), key=lambda each: each.gbit or 0, default=None
        )
        for end in (one, other)
    ]
    if best[0] is None or best[1] is None:
        return None
    return min(best[0], best[1], key=lambda each: each.gbit or 0)


def _described(network: Network) -> str:
    return f"{network.name} of {network.gbit:g} Gbit/s" if network.gbit else network.name


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def _unset(settings: set[str], family: str | None) -> str:
    """The line that takes settings of the network away that this MPI reads; "": there are none."""
    of_others = "OMPI_" if family == "mpich" else ("FI_", "MPIR_", "I_MPI_")
    chosen = sorted(setting for setting in settings if not setting.startswith(of_others))
    names = " ".join(setting.partition("=")[0] for setting in chosen)
    return f"unset {names} ({', '.join(chosen)})" if chosen else ""
