"""What `mpidl doctor` finds out: plain values, which travel between ranks, are judged, shown and written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mpidl.runtime.diagnosis import RankFacts


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """What started this process, by its environment."""

    name: str
    family: Literal["mpich", "openmpi", "any", "unknown"]
    """The MPI that it can start; "any": no launcher, "unknown": srun without an MPI plugin."""
    size: int | None
    """Processes it started; None without a launcher."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network device that is up."""

    name: str
    kind: Literal["ethernet", "loopback", "fabric", "other"]
    """A "fabric" is InfiniBand, RoCE, Omni-Path, Slingshot, or the like, which MPI can use without TCP."""
    gbit: float | None
    """Gbit/s that it should give; None: it does not say."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a rank has around it."""

    rank: RankFacts
    shared_memory_dir: str
    shared_memory_free: int | None
    """Bytes free there, None where there is none."""
    cache_dir: str
    """Folder of the compiled Numba kernels."""
    is_cache_writable: bool
    networks: tuple[Network, ...]
    network_settings: tuple[str, ...]
    """Variables, NAME=value, that choose what MPI sends by."""
    forks: bool
    """Whether torch's DataLoader forks its workers here, unguarded against memory that a fabric has registered."""
    gpu: str = "no GPU"
    """What `abilities.takes_gpu_memory` says."""
    folder_s: float | None = None
    """Seconds until the rank saw the file that rank 0 wrote; None: it did not."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What was measured between two ranks."""

    ranks: tuple[int, int]
    is_inside: bool
    """Both on one node."""
    latency_s: float
    """One way, of a message of 8 bytes."""
    bytes_per_s: float
    """One way, messages of 1 MiB, the fast ones."""
    copy_bytes_per_s: float
    """Of a copy in memory, by the first of the two."""
    device: str | None = None
    """The network device whose counters grew with it; None: none did."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that was found out, over all ranks."""

    versions: Mapping[str, str | None]
    """Package -> version of rank 0, None: not installed."""
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
    ranks: Mapping[int, Surroundings]
    """Those that have answered, in rank order; only this process where MPI was not started."""
    num_ranks: int = 1
    silent: str = ""
    """Who has not answered, and when; "": all have."""
    survives_lost_ranks: bool | None = None
    folder: str = ""
    folder_reason: str = ""
    """Why rank 0 could not write there."""
    links: tuple[Link, ...] = ()
