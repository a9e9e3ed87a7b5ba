"""What Slurm says about the job that this process belongs to: the one place that reads its variables.

Ranks and sizes are MPI's, never Slurm's: under hydra and Open MPI's mpirun Slurm's are those of the proxy that srun
started. The step's task count serves only to find the silent mistake of N processes that each believe to be alone.

No MPI here, and nothing is asked of Slurm but the job's end, where its variables do not have it (before 23.02).
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_FIRST_SPECIAL_STEP = 0xFFFF_FFF0
"""Step ids from here on are those of batch scripts and interactive shells, which are no job steps."""
_ASKING_LIMIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """The job, as its variables have it."""

    job_id: str
    """As squeue takes it: a number, for an array's element JOB_ELEMENT."""
    job_name: str
    num_nodes: int
    num_restarts: int
    """How often it was requeued."""
    step_tasks: int | None
    """Processes of the job step; None outside steps, in a batch script or a shell."""
    procid: int | None
    """This process's number within the step."""
    cpus_per_task: int | None
    """What was asked for; None: nothing was."""
    cpus_on_node: int | None
    """What the job, or the step, has here."""
    chosen_plugin: str | None
    """SLURM_MPI_TYPE, which means the same as srun's --mpi."""
    told_end_time: float | None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Slurm | None:
        """The job of this process; None: Slurm has not started it."""
        job_id = environment.get("SLURM_JOB_ID")
        if not job_id:
            return None
        if "SLURM_ARRAY_JOB_ID" in environment:
            job_id = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
        step = _number("SLURM_STEP_ID", environment)
        is_in_step = step is not None and step < _FIRST_SPECIAL_STEP
        end = _number("SLURM_JOB_END_TIME", environment)
        return cls(
            job_id=job_id,
            job_name=environment.get("SLURM_JOB_NAME", ""),
            num_nodes=_number("SLURM_JOB_NUM_NODES", environment) or 1,
            num_restarts=_number("SLURM_RESTART_COUNT", environment) or 0,
            step_tasks=_number("SLURM_STEP_NUM_TASKS", environment) if is_in_step else None,
            procid=_number("SLURM_PROCID", environment) if is_in_step else None,
            cpus_per_task=_number("SLURM_CPUS_PER_TASK", environment),
            cpus_on_node=_number("SLURM_CPUS_ON_NODE", environment),
            chosen_plugin=environment.get("SLURM_MPI_TYPE"),
            told_end_time=None if end is None else float(end),
        )

    def end_time(self, ask: Callable[..., str] | None = None) -> float | None:
        """When Slurm ends the job (time.time), None: never, or it does not say.

        May ask squeue, so one rank of a job calls this.

        Args:
            ask: what answers in squeue's place; for tests.
        """
        if self.told_end_time is not None:
            return self.told_end_time
        left = seconds_of((ask or output_of)(["squeue", "--noheader", f"--jobs={self.job_id}", "--format=%L"]))
        return None if left is None else time.time() + left

    def describe(self) -> str:
        """In words, for the first table."""
        restarts = f", restart {self.num_restarts}" if self.num_restarts else ""
        return f"job {self.job_id} ({self.job_name}){restarts}"


def output_of(command: list[str]) -> str:
    """What a Slurm command prints; nothing where it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ASKING_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def seconds_of(text: str) -> float | None:
    """Slurm's [DAYS-][[HOURS:]MINUTES:]SECONDS as seconds; None where it says UNLIMITED, INVALID or nothing."""
    days, _, clock = text.strip().rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or (days and not days.isdigit()):
        return None
    seconds = sum(int(part) * 60**power for power, part in enumerate(reversed(parts)))
    return float(seconds + 86_400 * int(days or 0))


def ignored_cpus(asked: int | None, num_cores: int, num_machine_cores: int) -> tuple[str, str] | None:
    """Does a rank have fewer cores than its job asked for? What is wrong and what mends it, or None.

    Since Slurm 22.05 srun does not take sbatch's --cpus-per-task; Open MPI's mpirun binds each rank to a core.

    Args:
        asked: CPUs per task of the job; None: nothing was asked for.
        num_cores: that the rank may run on.
        num_machine_cores: that its node has.
    """
    if asked is None or num_cores >= min(asked, num_machine_cores):
        return None
    return (
        f"the job asked for {asked} CPUs a task, but a rank may run on {num_cores} only",
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK in the job script, before srun; with Open MPI's mpirun: "
        "mpirun --bind-to none",
    )


def one_core_for_all(cpus_on_node: int | None, num_ranks: int, num_cores: int) -> tuple[str, str] | None:
    """Are all of a node's ranks bound to one core, where their job has more? As `ignored_cpus`.

    Args:
        cpus_on_node: of the job; None: not under Slurm.
        num_ranks: on the node.
        num_cores: on which any of them may run.
    """
    if cpus_on_node is None or num_cores > 1 or min(num_ranks, cpus_on_node) < 2:
        return None
    return (
        f"all {num_ranks} ranks of a node are bound to one core, of {cpus_on_node} CPUs that the job has there",
        "srun --cpu-bind=cores, mpirun --bind-to none (Open MPI), mpirun -bind-to none (MPICH)",
    )


def _number(name: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else None
