"""`mpidl doctor` in the shell or script of a Slurm allocation: one short job step looks at all of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from mpidl.doctor.software import PLUGINS, family_of, probe_library
from mpidl.runtime import launched_size
from mpidl.runtime.diagnosis import Finding
from mpidl.runtime.slurm import Slurm, output_of

_STEP_LIMIT_MIN = 2
_FOUND = "MPIDL_DOCTOR_FOUND"
"""The variable by which the job step gets what was found before it, to report it with the rest."""


def job_step(flags: Sequence[str] = (), environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """The command that looks at the whole of a Slurm allocation, in one short job step.

    It is srun with this shell's settings, so that what these do to a training is seen; only the MPI plugin is named
    where they do not.

    Args:
        flags: of `mpidl doctor`.
        environment: this process's variables.

    Returns:
        None outside an allocation's shell or script: in job steps, under mpirun, without Slurm.
    """
    slurm = Slurm.from_environment(environment)
    if slurm is None or launched_size(environment) is not None or shutil.which("srun") is None:
        return None
    family = family_of(probe_library()[0] or "")
    if family is None:
        return None
    plugin = [] if slurm.chosen_plugin else [f"--mpi={PLUGINS[family]}"]
    limit = [f"--time={_STEP_LIMIT_MIN}", "--kill-on-bad-exit=0"]
    return ["srun", "--overlap", *plugin, *limit, sys.executable, "-m", "mpidl", "doctor", *flags]


def default_plugin_finding(step: Sequence[str], configuration: str) -> Finding | None:
    """What is wrong where `srun` alone would take another MPI plugin than the job step does.

    Args:
        step: what `job_step` gave.
        configuration: what `scontrol show config` prints.
    """
    named = next((word for word in step if word.startswith("--mpi=")), None)
    lines = (line.split("=") for line in configuration.splitlines() if line.startswith("MpiDefault"))
    default = next((line[-1].strip() for line in lines), None)
    if named is None or default is None or default.split("_v")[0] == named.removeprefix("--mpi="):  # pmix_v4 is a pmix
        return None
    return Finding(
        "warning",
        f"srun alone takes --mpi={default} here: N processes would each believe to be alone, and mpidl would stop them",
        f"srun {named}, or once in the job script: export SLURM_MPI_TYPE={named.removeprefix('--mpi=')}",
    )


def examine(step: Sequence[str]) -> int:
    """Run the job step, which prints what it finds; returns its exit code."""
    out = sys.stderr if "--json" in step else sys.stdout  # where the document is all that may stand
    print(f"in one job step: {' '.join(step)}", file=out, flush=True)
    finding = default_plugin_finding(step, output_of(["scontrol", "show", "config"]))
    told = {} if finding is None else {_FOUND: json.dumps(asdict(finding))}
    return subprocess.run(step, stdin=subprocess.DEVNULL, check=False, env={**os.environ, **told}).returncode


def found_before(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """What `examine` found before it started the job step in which this process is."""
    text = environment.get(_FOUND)
    return [] if text is None else [Finding(**json.loads(text))]
