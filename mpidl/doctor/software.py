"""What is installed, what has started this process, and whether both belong together. No MPI is started here.

A wrong pair of launcher and library may kill the process, so the library is asked for its name in a child process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping

from mpidl.doctor.facts import Launcher
from mpidl.runtime import Slurm, launched_size
from mpidl.runtime.launcher import run_apart

_PROBE = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
_PROBE_LIMIT_S = 60
PLUGINS = {"mpich": "pmi2", "openmpi": "pmix"}
"""What srun's --mpi has to be for each MPI."""


def detect_launcher(environment: Mapping[str, str] = os.environ) -> Launcher:
    """The launcher by the variables that it leaves to a rank."""
    size, slurm = launched_size(environment), Slurm.from_environment(environment)
    is_step = slurm is not None and slurm.step_tasks is not None
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return Launcher(name="Open MPI's mpirun", family="openmpi", size=size)
    if "HYDI_CONTROL_FD" in environment or ("PMI_SIZE" in environment and not is_step):
        return Launcher(name="MPICH's mpirun (hydra)", family="mpich", size=size)
    if is_step:
        if "PMI_RANK" in environment:
            return Launcher(name="srun --mpi=pmi2", family="mpich", size=size)
        if "PMIX_RANK" in environment:
            return Launcher(name="srun --mpi=pmix", family="openmpi", size=size)
        return Launcher(name="srun without an MPI plugin", family="unknown", size=size)
    return Launcher(name="none", family="any", size=None)


def family_of(text: str) -> str | None:
    """Find out whether a library or an mpirun that calls itself so is "mpich" or "openmpi"; None: neither."""
    if "Open MPI" in text or "OpenRTE" in text:
        return "openmpi"
    if any(word in text for word in ("MPICH", "HYDRA", "Intel(R) MPI", "MVAPICH")):
        return "mpich"
    return None


def probe_library() -> tuple[str | None, str]:
    """The MPI library's name for itself, or None and the reason why it cannot be loaded."""
    output, problem = _output_of([sys.executable, "-c", _PROBE])
    name = " ".join(output.strip("\x00 \n").split("\n")[0].split())
    return (name, "") if name else (None, problem or "it says nothing")


def find_mpirun() -> tuple[str | None, str | None]:
    """The path of the mpirun that a shell here finds, and its family."""
    path = shutil.which("mpirun")
    return path, None if path is None else family_of(_output_of([path, "--version"])[0])


def _output_of(command: list[str]) -> tuple[str, str]:
    """A child's standard output, and what went wrong: the last line of its standard error."""
    try:
        done = run_apart(command, _PROBE_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    if done.returncode == 0:
        return done.stdout, ""
    return "", (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
