"""A real Slurm cluster for tests, by `jobs/local/slurm.py`, and a gate at which its jobs wait."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest

from tests.launch import ROOT, Completed, is_open_mpi, run

SCRIPT = [sys.executable, str(ROOT / "jobs" / "local" / "slurm.py")]
PATIENCE_S = 240.0
"""How long a job may take to do what is waited for: tests share their cores with others."""

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
"""What a job is in the end."""

T = TypeVar("T")


def plugin() -> str:
    """What srun's --mpi has to be for the MPI of this environment."""
    return "pmix" if is_open_mpi() else "pmi2"


def why_not() -> str:
    """Why this machine, or this user, can have no Slurm cluster; "" where it can."""
    if os.geteuid() != 0:
        return "a Slurm cluster on one machine needs root"
    path, tools = (
        os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"]),
        ("slurmctld", "slurmd", "munged", "ip", "tc"),
    )
    if missing := [tool for tool in tools if shutil.which(tool, path=path) is None]:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge iproute2"
    refused = run(["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "true"], timeout=30.0)
    return f"no namespaces here: {refused.stderr.strip()}" if refused.returncode else ""


def miss(reason: str) -> NoReturn:
    """Skip a test for want of something; a failure in `make test-slurm`."""
    if os.environ.get("MPIDL_TEST_SLURM") == "required":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def await_it(what: str, look: Callable[[], T | None]) -> T:
    """What `look` finds in the end."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"not after {PATIENCE_S:g} s: {what}", pytrace=False)
        time.sleep(0.2)
    return found


class LocalSlurm:
    """A cluster that is up, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def slurm_py(self, command: str, *args: object) -> Completed:
        """What `slurm.py COMMAND --name ... ARGS` did."""
        return run([*SCRIPT, command, "--name", self.name, *map(str, args)])

    def run(self, *command: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Completed:
        """Run a command as on the login node."""
        python = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        line = [*SCRIPT, "run", "--name", self.name, "--", *map(str, command)]
        return run(
            line, cwd=cwd, timeout=PATIENCE_S, env={"PYTHONPATH": python, "SLURM_MPI_TYPE": plugin(), **(env or {})}
        )

    def submit(
        self, folder: Path, script: str, args: Sequence[object], *options: str, env: Mapping[str, str] | None = None
    ) -> str:
        """Submit one of the scripts in jobs/ from the folder; returns the job's number."""
        line = ["sbatch", "--parsable", "--cpus-per-task=1", *options, ROOT / "jobs" / script, *args]
        return self.run(*line, cwd=folder, env=env).check().stdout.strip()

    def shown(self, job: str) -> dict[str, str]:
        """What Slurm says about a job."""
        told = self.run("scontrol", "--oneliner", "show", "job", job).check().stdout
        return dict(re.findall(r"(\S+?)=(\S*)", told))

    def wait(self, job: str, state: str, restarts: int | None = None) -> dict[str, str]:
        """Wait until a job is in a state, having been requeued so often."""

        def look() -> dict[str, str] | None:
            shown = self.shown(job)
            if shown["JobState"] == state and restarts in (None, int(shown["Restarts"])):
                return shown
            if shown["JobState"] in ENDED:
                pytest.fail(f"{shown}\n{self.output(shown)}", pytrace=False)
            return None

        return await_it(f"job {job} {state}", look)

    def output(self, shown: dict[str, str]) -> str:
        """What a job has printed."""
        file = Path(shown["StdOut"])
        return file.read_text() if file.exists() else ""


class Gate:
    """Where jobs of `GatedNet` wait."""

    def __init__(self, folder: Path, at_pass: int) -> None:
        self._folder = folder
        self.env = {"GATE": f"{folder}:{at_pass}"}

    def wait_until_reached(self) -> None:
        """By one rank: the others then wait for that one."""
        await_it("a rank at the gate", lambda: any(self._folder.glob("reached-*")))

    def open(self) -> None:
        (self._folder / "open").touch()
