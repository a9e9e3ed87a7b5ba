"""What the launcher says about this process, read from the environment without starting MPI.

Slurm's own rank variables are never used as the rank: under hydra and Open MPI's mpirun they are those of the proxy.
The step's task count serves only to find the silent mistake of N processes that each believe to be alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
LAUNCHER_PREFIXES = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL", "MPICH_", "PALS_")


def _first_number(names: tuple[str, ...], environment: Mapping[str, str]) -> int | None:
    for name in names:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return None


def launched_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """This process's rank by the launcher's word, or None when no launcher started it."""
    rank = _first_number(_RANKS, environment)
    if rank is None and launched_size(environment) is not None:
        rank = _first_number(("SLURM_PROCID",), environment)
    return rank


def launched_size(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks the launcher started, or None when no launcher started this process."""
    size = _first_number(_SIZES, environment)
    if size is None and "SLURM_STEP_ID" in environment and environment.get("SLURM_STEP_ID", "").isdigit():
        size = _first_number(("SLURM_STEP_NUM_TASKS",), environment)
    return size


def without_launcher(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without the launcher's variables: for children that must not believe to be a rank."""
    return {name: value for name, value in environment.items() if not name.startswith(LAUNCHER_PREFIXES)}


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
