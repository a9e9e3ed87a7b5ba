"""Jobs on a real Slurm cluster: the scripts in jobs/, what Slurm does to them, and the weights in the end."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.local_slurm import Gate, LocalSlurm, plugin
from tests.launch import ROOT

pytestmark = pytest.mark.slurm

FOUR = "--nodes=4"
# 5 iterations an epoch; on 4 nodes rank 0 has 2 partitions in each, so that its 15th pass is in the 8th iteration.
JOB = [
    "--model", "tests.cluster.jobs.gated:GatedNet", "--data", "tests.cli.jobs.parts:noisy_digits",
    "--optimizer", "adamw", "--lr", "0.01", "--batch-size", "48", "--partitions", "8", "--balance", "off",
    "--threads-per-rank", "1", "--epochs", "3",
]  # fmt: skip
AT_PASS, AT_ITERATION, LAST_CHECKPOINT = 15, 8, 5


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "weights.safetensors").read_bytes()).hexdigest()


def first_iterations(run_dir: Path) -> list[int]:
    """Of all starts of a run."""
    events = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [event["first_iteration"] for event in events if event["event"] == "start"]


def stub(folder: Path, script: str) -> str:
    """An option of sbatch that puts a shell script in `mpidl`'s place, for what a job does around a training."""
    file = folder / "bin" / "mpidl"
    file.parent.mkdir()
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return f"--export=ALL,PATH={file.parent}:/usr/bin:/bin"


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights that an undisturbed job has in the end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = cluster.submit(folder, "train.sbatch", [*JOB, "--run-dir", "run"], FOUR)
    told = cluster.output(cluster.wait(job, "COMPLETED"))
    assert "4 ranks on 4 nodes (host1, host2, host3, host4), 1 thread each" in told
    assert f"job {job} (train)" in told
    assert "time left" in told
    return weights(folder / "run")


def test_a_job_that_is_signalled_is_requeued_and_ends_with_the_bits_of_an_undisturbed_run(
    cluster: LocalSlurm, undisturbed: str, tmp_path: Path
) -> None:
    gate = Gate(tmp_path, AT_PASS)
    job = cluster.submit(tmp_path, "preempt.sbatch", JOB, FOUR, env=gate.env)
    gate.wait_until_reached()
    cluster.run("scancel", "--batch", "--signal=USR1", job).check()  # as --signal=B:USR1@... before the time limit
    told = cluster.output(cluster.wait(job, "COMPLETED", restarts=1))
    run_dir = tmp_path / "runs" / f"preempt-{job}"
    assert first_iterations(run_dir) == [0, AT_ITERATION], told
    told_in_one_line = " ".join(told.replace("|", "").split())
    assert f"a signal to rank 0 stopped all ranks after iteration {AT_ITERATION}" in told_in_one_line
    assert f"job {job} (preempt), restart 1" in told
    assert weights(run_dir) == undisturbed


def test_a_job_whose_node_loses_power_is_requeued_and_ends_with_the_bits_of_an_undisturbed_run(
    cluster: LocalSlurm, undisturbed: str, tmp_path: Path
) -> None:
    gate = Gate(tmp_path, AT_PASS)
    job = cluster.submit(tmp_path, "preempt.sbatch", JOB, FOUR, env=gate.env)
    gate.wait_until_reached()
    cluster.slurm_py("off", "host3").check()
    record = json.loads(cluster.run("sh", "-c", 'cat "$(dirname "$SLURM_CONF")/cluster.json"').check().stdout)
    assert record["pids"][3] == 0, "that number may be another process's by now"
    assert "host3 is off" in cluster.slurm_py("off", "host3").stderr
    cluster.wait(job, "PENDING", restarts=1)
    gate.open()
    cluster.slurm_py("on", "host3").check()
    told = cluster.output(cluster.wait(job, "COMPLETED", restarts=1))
    run_dir = tmp_path / "runs" / f"preempt-{job}"
    assert "DUE TO NODE FAILURE" in told
    assert first_iterations(run_dir) == [0, LAST_CHECKPOINT], told
    assert weights(run_dir) == undisturbed


def test_a_cancelled_job_keeps_what_it_has_and_goes_on_on_two_nodes_to_the_same_bits(
    cluster: LocalSlurm, undisturbed: str, tmp_path: Path
) -> None:
    gate = Gate(tmp_path, AT_PASS)
    job = cluster.submit(tmp_path, "preempt.sbatch", JOB, FOUR, env=gate.env)
    gate.wait_until_reached()
    cluster.run("scancel", job).check()
    shown = cluster.wait(job, "CANCELLED", restarts=0)
    assert "requeues itself" not in cluster.output(shown)
    run_dir = tmp_path / "runs" / f"preempt-{job}"
    again = cluster.submit(tmp_path, "train-mpirun.sbatch", ["--resume", run_dir], "--nodes=2")
    told = cluster.output(cluster.wait(again, "COMPLETED"))
    assert "2 ranks on 2 nodes (" in told
    assert first_iterations(run_dir) == [0, AT_ITERATION], told
    assert weights(run_dir) == undisturbed


def test_an_array_trains_each_of_several_settings(cluster: LocalSlurm, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path, "sweep.sbatch", [ROOT / "tests/cli/jobs/small.toml", "--epochs", "1"], "--array=0-1")
    for element, rate in enumerate(("0.03", "0.1")):
        cluster.wait(f"{job}_{element}", "COMPLETED")
        run_dir = tmp_path / "runs" / f"sweep-{job}" / str(element)
        assert f"lr = {rate}\n" in (run_dir / "config.toml").read_text()
        assert (run_dir / "FINISHED").exists()


def test_an_array_measures_each_number_of_nodes(cluster: LocalSlurm, tmp_path: Path) -> None:
    path = stub(
        tmp_path, 'echo "$SLURM_STEP_NUM_NODES $SLURM_STEP_NUM_TASKS $*" >"said-$SLURM_ARRAY_TASK_ID-$SLURM_PROCID"'
    )
    options = ["--array=1,4", path]
    job = cluster.submit(tmp_path, "scaling.sbatch", ["--way", "x"], *options)
    for nodes in (1, 4):
        cluster.wait(f"{job}_{nodes}", "COMPLETED")
    for nodes in (1, 4):
        said = {file.read_text().strip() for file in tmp_path.glob(f"said-{nodes}-*")}
        assert said == {f"4 4 bench scaling --nodes {nodes} --json scaling-{job}/{nodes}.json --way x"}


def test_a_job_that_never_gets_anywhere_gives_up(cluster: LocalSlurm, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path, "preempt.sbatch", JOB, "--nodes=1", stub(tmp_path, "exit 1"))
    told = cluster.output(cluster.wait(job, "FAILED", restarts=3))
    assert "no new checkpoint in 3 starts; this job gives up" in told


def test_a_job_that_gets_one_iteration_further_in_each_start_goes_on(cluster: LocalSlurm, tmp_path: Path) -> None:
    script = """
        for run; do :; done
        cd "$run" && mkdir -p checkpoints && count=$(ls checkpoints | wc -l)
        [ "$count" = 4 ] && exec touch FINISHED
        [ "$count" = 0 ] && name=epoch-000001 || name=epoch-000001+00000$count
        mkdir "checkpoints/$name" && touch "checkpoints/$name/manifest.json"
        exit 75
    """
    job = cluster.submit(tmp_path, "preempt.sbatch", JOB, "--nodes=1", stub(tmp_path, script))
    told = cluster.output(cluster.wait(job, "COMPLETED", restarts=4))
    assert "gives up" not in told


def test_a_mistake_in_the_settings_ends_the_job_at_once(cluster: LocalSlurm, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path, "preempt.sbatch", [*JOB, "--lr", "-1"], "--nodes=2")
    told = cluster.output(cluster.wait(job, "FAILED", restarts=0))
    assert told.count("mpidl: error: --lr") == 1


def test_the_wrong_mpi_plugin_is_no_silent_mistake_but_an_error_that_names_the_right_one(
    cluster: LocalSlurm, tmp_path: Path
) -> None:
    job = cluster.submit(tmp_path, "train.sbatch", JOB, "--nodes=2", env={"SLURM_MPI_TYPE": "none"})
    shown = cluster.wait(job, "FAILED")
    told = cluster.output(shown)
    assert told.count("the launcher started 2 processes, but MPI") == 1, told
    assert "`srun --mpi=pmi2` for MPICH and `srun --mpi=pmix` for Open MPI" in told
    assert shown["ExitCode"] == "2:0"


def test_doctor_looks_at_a_whole_allocation(cluster: LocalSlurm, tmp_path: Path) -> None:
    ended = cluster.run("env", "--unset=SLURM_MPI_TYPE", "salloc", FOUR, "mpidl", "doctor", cwd=tmp_path).check()
    for part in ("4 processes", "| host1", "| host4", "srun alone takes --mpi=none here"):
        assert part in ended.stdout, ended.output
    assert "nothing is wrong" not in ended.stdout


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        (["--ntasks=2", "--nodes=1"], "all 2 ranks of a node are bound to one core", "srun --cpu-bind=cores"),
        (["--cpus-per-task=2", "--nodes=2"], "2 CPUs a task, but a rank may run on 1 only", "SRUN_CPUS_PER_TASK"),
    ],
    ids=["one core for all", "fewer than asked for"],
)
def test_cores_that_ranks_lack_are_an_error_before_anything_starts(
    cluster: LocalSlurm, tmp_path: Path, options: list[Any], what: str, fix: str
) -> None:
    program = "import mpidl; mpidl.init()"
    step = ["srun", *options, f"--mpi={plugin()}", "taskset", "--cpu-list", "0", "python", "-c", program]
    ended = cluster.run("env", "--unset=OMP_NUM_THREADS", *step, cwd=tmp_path)
    assert ended.returncode != 0, ended.output
    assert ended.stderr.count(what) == 1, ended.output
    assert fix in ended.stderr
