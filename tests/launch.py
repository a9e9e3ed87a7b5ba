"""Launching jobs of several ranks from a test, each with a time limit and nothing left behind."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""

# What launchers tell their ranks: a job started with these would believe that it is a rank of the outer one.
LAUNCHER_VARIABLE = re.compile(r"PMI_|PMIX_|HYDI_|MPI_LOCAL|OMPI_(COMM_WORLD|UNIVERSE|FILE|APP|NUM)_?|PRTE_(?!MCA)")

TERMINATE_S = 5.0
"""How long a job that ran over its time limit may take to end its own ranks."""


@dataclass(frozen=True)
class Completed:
    """A job that has ended."""

    command: list[str]
    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def output(self) -> str:
        """Everything that the job printed, for messages."""
        return f"$ {' '.join(self.command)}\n{self.stdout}{self.stderr}(code {self.returncode}, {self.seconds:.1f} s)"

    def check(self) -> Completed:
        """Fail the test, with the job's output, unless the job ended with code 0."""
        if self.returncode != 0:
            pytest.fail(self.output, pytrace=False)
        return self


def launch(
    n: int,
    args: Sequence[str | Path],
    *,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    mpi_options: Sequence[str] = (),
) -> Completed:
    """Run ``mpirun -n N ARGS`` of the environment that runs the tests.

    Args:
        n: number of ranks.
        args: the command and its arguments; commands of this environment come first in PATH.
        timeout: seconds after which the job is ended and the test fails.
        env: variables on top of this process's own.
        cwd: where to run; the checkout by default.
        mpi_options: options of mpirun, before the command.
    """
    options = ["--oversubscribe"] if is_open_mpi() else []
    return run([mpirun(), "-n", str(n), *options, *mpi_options, *args], timeout=timeout, env=env, cwd=cwd)


def python(
    n: int,
    code: str,
    *,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    mpi_options: Sequence[str] = (),
) -> Completed:
    """Run a piece of Python on ``n`` ranks; see `launch` for the other arguments."""
    args = [sys.executable, "-c", code]
    return launch(n, args, timeout=timeout, env=env, cwd=cwd, mpi_options=mpi_options)


def run(
    args: Sequence[str | Path],
    *,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Completed:
    """Run one command without a launcher; see `launch` for the arguments."""
    command = [str(arg) for arg in args]
    begin = time.perf_counter()
    # A session of its own: the command and all that it starts can be ended together, and nothing else is.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment() | dict(env or {}),
        cwd=cwd or ROOT,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        stdout, stderr = _end(process)
        ended = Completed(command, process.returncode, stdout, stderr, time.perf_counter() - begin)
        pytest.fail(f"still running after {timeout:g} s:\n{ended.output}", pytrace=False)
    except BaseException:
        _end(process)
        raise
    return Completed(command, process.returncode, stdout, stderr, time.perf_counter() - begin)


def environment() -> dict[str, str]:
    """This process's variables without those of a launcher, with this environment's commands first in PATH."""
    env = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLE.match(name)}
    bin_dir = str(Path(sys.prefix) / "bin")
    env["PATH"] = os.pathsep.join([bin_dir, env.get("PATH", os.defpath)])
    # Rank programs find the checkout wherever they run, installed or not.
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    # Open MPI gives the ranks a terminal even where there is none; what they print is to be plain all the same.
    env |= {"TERM": "dumb", "NO_COLOR": "1"}
    if os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return env


@functools.cache
def mpirun() -> str:
    """The launcher of this environment, or the site's where mpidl was installed without an MPI."""
    own = Path(sys.prefix) / "bin" / "mpirun"
    found = str(own) if own.exists() else shutil.which("mpirun")
    if found is None:
        pytest.fail("no mpirun here or in PATH; install one: pip install mpich", pytrace=False)
    return found


@functools.cache
def is_open_mpi() -> bool:
    """Whether `mpirun` is Open MPI's, which counts cores and wants to be told to use them twice."""
    return "Open MPI" in run([mpirun(), "--version"], timeout=30.0).stdout


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a session: politely, so that a launcher can end ranks on other hosts, then for certain."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            return process.communicate(timeout=TERMINATE_S)
        except subprocess.TimeoutExpired:
            continue
    return process.communicate()
