"""What jobs/preempt.sbatch does with the exit code of a training, beside commands in place of Slurm's and mpidl's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import ROOT, Completed, run

CHECKPOINT = "checkpoints/epoch-000001"
RUN_DIR = "runs/preempt-7"


def start(folder: Path, code: int) -> Completed:
    """One start of the job, whose training ends with this code."""
    commands = {
        "srun": f"echo srun $*; exit {code}",
        "squeue": "echo RUNNING",
        "scontrol": "echo scontrol $*",
        "sleep": "",
    }
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in commands.items():
        file = folder / "bin" / name
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    env = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "SLURM_JOB_NAME": "preempt",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "1",
    }
    return run(["bash", str(ROOT / "jobs/preempt.sbatch"), "job.toml"], env=env, cwd=folder, timeout=30.0)


def add_checkpoint(folder: Path) -> None:
    path = folder / RUN_DIR / CHECKPOINT
    path.mkdir(parents=True)
    (path / "manifest.json").touch()


@pytest.mark.parametrize(
    ("code", "has_checkpoint", "is_requeued"),
    [
        (2, False, False),
        (2, True, True),
        (3, True, False),
        (4, False, True),
        (4, True, True),
        (75, True, True),
        (77, True, True),
    ],
)
def test_a_training_that_fails_is_requeued_unless_the_next_start_would_fail_alike(
    code: int, has_checkpoint: bool, is_requeued: bool, tmp_path: Path
) -> None:
    if has_checkpoint:
        add_checkpoint(tmp_path)
    ended = start(tmp_path, code)
    assert ended.returncode == code, ended.output
    assert ("scontrol requeue 7" in ended.stdout) == is_requeued, ended.output


def test_a_job_gives_up_after_three_starts_in_a_row_without_a_new_checkpoint(tmp_path: Path) -> None:
    assert start(tmp_path, 4).returncode == 4
    add_checkpoint(tmp_path)
    for _ in range(3):
        assert start(tmp_path, 4).returncode == 4
    ended = start(tmp_path, 4)
    assert ended.returncode == 1, ended.output
    assert "no new checkpoint in 3 starts" in ended.stdout
    assert "srun" not in ended.stdout


def test_a_job_that_cannot_count_its_starts_gives_up(tmp_path: Path) -> None:
    (tmp_path / RUN_DIR / "starts").mkdir(parents=True)
    ended = start(tmp_path, 4)
    assert ended.returncode == 1, ended.output
    assert "this job gives up" in ended.stdout
    assert "srun" not in ended.stdout
